"""Configuration: recipes by name and from files, and the checks of what they hold."""
