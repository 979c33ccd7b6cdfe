"""The REST faces: TGI's routes and OpenAI's, over ASGI."""
