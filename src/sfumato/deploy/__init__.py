"""Deployment: a description of the machine that models run on."""
