"""What surgery needs on elastic models: other capacities, the axes that channels run along, plain layers made elastic."""
