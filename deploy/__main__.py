"""`python -m deploy` is `isthmus`."""

from deploy.cli import main

main()
