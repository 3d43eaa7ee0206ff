"""Learnable memory tokens: banks, chapters and their routers, low rank and few bits."""
