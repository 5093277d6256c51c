// What capx has sent, verified by npm's `standardwebhooks`: a file of lines, each with the
// headers, the body and the secrets of a call.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const refuses = (secret, body, headers) =>
  assert.throws(() => new Webhook(secret).verify(body, headers), WebhookVerificationError);

let seen = 0;
for (const line of readFileSync(process.argv[2], "utf8").trim().split("\n")) {
  const { headers, body, secrets } = JSON.parse(line);
  for (const secret of secrets) {
    assert.equal(new Webhook(secret).verify(body, headers).id, headers["webhook-id"]);
    refuses(secret, body + " ", headers);
    refuses(secret, body, { ...headers, "webhook-id": headers["webhook-id"] + "0" });
    refuses(secret, body, { ...headers, "webhook-timestamp": "1" });
  }
  refuses("whsec_" + "A".repeat(43) + "=", body, headers);
  seen += 1;
}
assert.ok(seen >= 3, `${seen}`);
console.log(seen);
