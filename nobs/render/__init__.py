"""One report, many pictures of it: `terminal` prints, `figure` draws. They read a `Report` and nothing else."""
