"""The faces of the router: thin translations between wire formats and the service."""
