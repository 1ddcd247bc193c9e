"""What leaves Python: a model with its explainer as a program or a file, and explainers in folders and on the Hub."""
