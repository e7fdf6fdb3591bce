"""The tests: the listing of this folder is the list of promises."""
