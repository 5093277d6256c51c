"""What capx has sent, verified by PyPI's `standardwebhooks`: a file of lines, each with the
headers, the body and the secrets of a call."""

import json
import sys

from standardwebhooks.webhooks import Webhook, WebhookVerificationError


def refused(secret, body, headers):
    try:
        Webhook(secret).verify(body, headers)
    except WebhookVerificationError:
        return True
    return False


seen = 0
for line in open(sys.argv[1], encoding="utf-8"):
    call = json.loads(line)
    headers, body = call["headers"], call["body"]
    for secret in call["secrets"]:
        assert Webhook(secret).verify(body, headers)["id"] == headers["webhook-id"]
        assert refused(secret, body + " ", headers)
        assert refused(secret, body, {**headers, "webhook-id": headers["webhook-id"] + "0"})
        assert refused(secret, body, {**headers, "webhook-timestamp": "1"})
    assert refused("whsec_" + "A" * 43 + "=", body, headers)
    seen += 1
assert seen >= 3, seen
print(seen)
