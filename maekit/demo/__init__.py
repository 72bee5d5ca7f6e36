"""`maekit demo`: the whole loop on pictures it draws itself."""
