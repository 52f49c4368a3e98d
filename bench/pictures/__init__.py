"""What a method adds to drawing a picture, in every form that there is."""
