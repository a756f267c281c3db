"""Small helpers that import neither torch nor the rest of the package: numbers of callers, files, folders."""
