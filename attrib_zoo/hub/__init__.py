"""Sharing fitted explainers: a folder with a card, a repository of the Hugging Face Hub."""
