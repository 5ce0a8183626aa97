"""The crash test: real processes, killed and cut off at random, and what they must have agreed on in the end."""
