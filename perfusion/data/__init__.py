"""What a person brings to a training: pictures of one object, optional masks, and the prompts it is trained with."""
