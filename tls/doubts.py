"""Whether the members of a cluster would believe each other, found out before they meet.

To tell a member that its certificate is refused, TLS has a single word, which gRPC does not pass on
(docs/operations.md, "Encryption"). So whoever shows a certificate first shows it to itself.
"""

import ssl

from tls.files import Files, Material

# Messages that a handshake goes to and fro, with room.
_TURNS = 10


def doubt(files: Files, material: Material) -> str | None:
    """Why others that believe the same CA would refuse what the files show, in a line."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # where members are found is not known here
    try:
        client.load_cert_chain(files.cert, files.key)
        client.load_verify_locations(files.ca)
        _meet(material.context, client)
    except ssl.SSLCertVerificationError as error:
        return (
            f"certificate {files.cert}: {error.verify_message}, says the CA file {files.ca}; "
            "members of the cluster that have the same will refuse it"
        )
    except OSError:  # they are being replaced, and looked at again then
        return None
    return None


def _meet(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    """A handshake in memory. Raises what either side does."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for turn in range(_TURNS):
        try:
            (server if turn % 2 else client).do_handshake()
        except ssl.SSLWantReadError:
            continue
