"""Profiles and traces for people: text, plots, drawings and a page."""
