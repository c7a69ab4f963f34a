"""Instance masks from dynamic kernels. numpy only.

A model of instances gives every prior the parameters of three 1 x 1 convolutions (its *kernel*), and the image 8
*mask features* at stride 8 (RTMDet, arXiv 2212.07784, section 3.4; mmdet 3.x ``RTMDetInsHead``). The 10 inputs of the
first convolution are the two coordinates relative to the prior, then the features.
"""

from __future__ import annotations

#: Channels of the mask features.
NUM_MASK_FEATURES = 8
#: (inputs, outputs) of the three convolutions; a kernel holds all weights (output-major), then all biases.
KERNEL_LAYERS = ((2 + NUM_MASK_FEATURES, 8), (8, 8), (8, 1))
#: Numbers in a kernel: 80 + 64 + 8 weights and 8 + 8 + 1 biases.
NUM_KERNEL_PARAMETERS = sum(inputs * outputs + outputs for inputs, outputs in KERNEL_LAYERS)
