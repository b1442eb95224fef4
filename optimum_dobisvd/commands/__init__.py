"""`optimum-cli dobisvd`: one file per subcommand. Importing them costs nothing; torch is imported when one runs."""
