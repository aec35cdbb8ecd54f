"""What the answers of both models come to: curves and a verdict, the worst of a grid, three groups of people, a picture. Pure."""
