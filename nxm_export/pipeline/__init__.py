"""All stages in a row (`nxm run`), and the commands that work on several engines at once."""
