//! API keys: `capx_sk_live_` or `capx_sk_test_` and 43 characters, 56 in all.
//! 37 characters are random (220 bits), six are a checksum, so that a mistyped
//! or invented key costs no query. Only the SHA-256 is stored.

use super::digest::sha256;

const LIVE: &str = "capx_sk_live_";
const TEST: &str = "capx_sk_test_";
const SECRET_CHARS: usize = 37;
const CHECK_CHARS: usize = 6;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// The scopes that a key can carry; `*` is all of them.
pub const SCOPES: &[&str] = &[
    "*",
    "companies:read",
    "companies:write",
    "agents:read",
    "agents:write",
    "tasks:read",
    "tasks:write",
    "playbooks:read",
    "playbooks:write",
    "activity:read",
    "approvals:read",
    "approvals:write",
    "webhooks:read",
    "webhooks:write",
    "ops:read",
    "ops:write",
];

/// The secret of a key. Shown once, at its making.
pub struct ApiKey {
    text: String,
}

impl ApiKey {
    /// Makes a key from random numbers, `draw(n)` giving one below `n`.
    pub fn generate(live: bool, mut draw: impl FnMut(usize) -> usize) -> Self {
        let mut text = String::from(if live { LIVE } else { TEST });
        for _ in 0..SECRET_CHARS {
            text.push(char::from(ALPHABET[draw(ALPHABET.len()) % ALPHABET.len()]));
        }
        let check = checksum(&text);
        text.push_str(&check);
        Self { text }
    }

    /// Reads a presented key; `None` when it cannot be one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let tail = text.strip_prefix(LIVE).or_else(|| text.strip_prefix(TEST))?;
        let well_formed = tail.len() == SECRET_CHARS + CHECK_CHARS && tail.bytes().all(|b| b.is_ascii_alphanumeric());
        if !well_formed {
            return None;
        }
        let (head, check) = text.split_at(text.len() - CHECK_CHARS);
        (checksum(head) == check).then(|| Self { text: text.to_owned() })
    }

    /// The key itself, for the one time that it is shown.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// Whether it spends credits and has effects.
    pub fn is_live(&self) -> bool {
        self.text.starts_with(LIVE)
    }

    /// What is stored and looked up.
    pub fn hash(&self) -> [u8; 32] {
        sha256(&self.text)
    }

    /// The masked form that lists show, e.g. `capx_sk_live_...abc`.
    pub fn hint(&self) -> String {
        let prefix = if self.is_live() { LIVE } else { TEST };
        format!("{prefix}...{}", &self.text[self.text.len() - 3..])
    }
}

fn checksum(head: &str) -> String {
    let digest = sha256(format!("capx/key/v1\0{head}"));
    digest[..CHECK_CHARS].iter().map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(live: bool) -> ApiKey {
        let mut n = 0;
        ApiKey::generate(live, |below| {
            n += 7;
            n % below
        })
    }

    #[test]
    fn a_key_has_the_documented_length_and_reads_back() {
        for live in [true, false] {
            let key = key(live);
            assert_eq!(key.reveal().len(), 56);
            let back = ApiKey::parse(key.reveal()).expect("reads back");
            assert_eq!(back.hash(), key.hash());
            assert_eq!(back.is_live(), live);
        }
    }

    #[test]
    fn a_wrong_letter_a_wrong_length_and_a_foreign_key_cost_no_lookup() {
        let good = key(true).reveal().to_owned();
        for at in 13..56 {
            let mut bad = good.clone().into_bytes();
            bad[at] = if bad[at] == b'x' { b'y' } else { b'x' };
            assert!(ApiKey::parse(std::str::from_utf8(&bad).expect("ascii")).is_none());
        }
        for bad in ["", "capx_sk_live_abc123", &good[1..], &format!("{good}a"), "sk-ant-api03-xyz"] {
            assert!(ApiKey::parse(bad).is_none());
        }
    }
}
