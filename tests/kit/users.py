"""Auth: who may do what, and what it costs to find out."""

from __future__ import annotations

import json

import requests

_AUTH_ROOT = ("root", "rootpw")


def _auth_call(url, method, path, body=None, *, auth=_AUTH_ROOT):
    """Return (status, JSON or text) of a request to the auth API."""
    answer = requests.request(
        method, f"{url}/v2/auth/{path}", auth=auth, timeout=60,
        data=None if body is None else json.dumps(body))
    try:
        return answer.status_code, answer.json()
    except ValueError:
        return answer.status_code, answer.text


def _auth_key(url, method, key, *, auth=None, **form):
    query = {name: form.pop(name) for name in ("recursive", "wait") if name in form}
    return requests.request(method, f"{url}/v2/keys{key}", params=query, data=form or None,
                            auth=auth, timeout=60).status_code


def _auth_enable(url, *, guest=False):
    """Create root, enable, and leave guests without rights unless told otherwise."""
    assert _auth_call(url, "PUT", "users/root", {"user": "root", "password": "rootpw"})[0] == 201
    assert _auth_call(url, "PUT", "enable") == (200, "")
    if not guest:
        everything = {"kv": {"read": ["/*"], "write": ["/*"]}}
        nothing = {"role": "guest", "revoke": everything}
        assert _auth_call(url, "PUT", "roles/guest", nothing)[0] == 200
