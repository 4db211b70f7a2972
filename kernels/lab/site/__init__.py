"""What is made of the notebooks for a browser or a class: a static site, slide decks, copies without solutions."""
