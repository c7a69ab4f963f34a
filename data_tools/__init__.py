"""Thin ``python -m data_tools.NAME`` fronts over rtmdet_geo; the package never imports from here."""
