"""Messages between the server and the engine process, and the channel that carries them."""
