"""Model folders, weight files and side files on disk: the one reader and the one writer."""
