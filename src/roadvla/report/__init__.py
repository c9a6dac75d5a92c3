"""Tables, figures and a page made from the files that runs leave behind, and nothing else."""
