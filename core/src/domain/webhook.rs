//! Webhooks as others send and receive them: the [Standard Webhooks](https://www.standardwebhooks.com)
//! specification, version 1, and the signatures of GitHub's. Pure: the time is given.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rand::RngCore;
use ring::hmac::{self, HMAC_SHA256, Key};

use super::digest::{hex, sha256};

/// So much may a message's time differ from ours, in seconds: the specification's own.
pub const TOLERANCE_S: i64 = 300;
/// Signatures of one message that are looked at, of as many as a sender's rotation has.
const SIGNATURES_MAX: usize = 10;
/// The longest id of a message, in bytes.
const ID_BYTES_MAX: usize = 255;

/// What signs.
pub type Secret = [u8; 32];

/// `x-hub-signature-256` of a body, as GitHub signs it: its key is a text, so it is the secret as
/// people keep it.
pub fn sign_as_github(secret: &[u8], body: &[u8]) -> String {
    github(written(secret).as_bytes(), body)
}

fn github(key: &[u8], body: &[u8]) -> String {
    format!("sha256={}", hex(hmac::sign(&Key::new(HMAC_SHA256, key), body).as_ref()))
}

/// A new one: 32 bytes of a generator that the operating system has seeded.
pub fn new_secret() -> Secret {
    let mut secret = [0; 32];
    rand::rng().fill_bytes(&mut secret);
    secret
}

/// A secret as people keep it: `whsec_` and base64.
pub fn written(secret: &[u8]) -> String {
    format!("whsec_{}", STANDARD.encode(secret))
}

/// What a message's signature is over.
fn signed(id: &str, timestamp: i64, body: &[u8]) -> Vec<u8> {
    [format!("{id}.{timestamp}.").as_bytes(), body].concat()
}

/// A message's `webhook-signature`, one for each secret.
pub fn sign(secrets: &[&[u8]], id: &str, timestamp: i64, body: &[u8]) -> String {
    let message = signed(id, timestamp, body);
    let one = |secret: &&[u8]| {
        format!("v1,{}", STANDARD.encode(hmac::sign(&Key::new(HMAC_SHA256, secret), &message).as_ref()))
    };
    secrets.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// What a request says of itself.
#[derive(Debug, Clone, Copy)]
pub enum Claim<'a> {
    /// `webhook-id`, `webhook-timestamp`, `webhook-signature`.
    Standard {
        /// The message's, the same over all tries of it.
        id: &'a str,
        /// When this try was made, in seconds since 1970.
        timestamp: &'a str,
        /// `v1,…`, one or more.
        signature: &'a str,
    },
    /// `x-hub-signature-256: sha256=…`, over the body alone.
    GitHub {
        /// That header.
        signature: &'a str,
    },
}

/// Why a message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Its headers are none.
    Malformed,
    /// It was sent too long ago.
    Stale,
    /// It is from the future.
    Future,
    /// Nobody who knows the secret has signed this.
    WrongSignature,
    /// The very same was taken before.
    Replayed,
}

impl Refused {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "the headers that sign the webhook cannot be read",
            Self::Stale => "the webhook's timestamp is more than 5 minutes ago",
            Self::Future => "the webhook's timestamp is more than 5 minutes ahead",
            Self::WrongSignature => "the webhook's signature does not match",
            Self::Replayed => "this webhook was taken before: a new try has a new timestamp",
        }
    }
}

/// A message that somebody who knows the secret has sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The same over all tries of it.
    pub id: String,
    /// When this try was made; nothing, where the sender does not say.
    pub sent_at: Option<i64>,
}

impl Claim<'_> {
    /// Holds a message to a secret, or the one before it; `now` in seconds since 1970.
    ///
    /// # Errors
    /// Why it is not taken.
    pub fn verify(&self, secrets: &[&[u8]], body: &[u8], now: i64) -> Result<Message, Refused> {
        match *self {
            Self::Standard { id, timestamp, signature } => {
                // With a dot in it one signature would stand for several messages.
                let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'.';
                if id.is_empty() || id.len() > ID_BYTES_MAX || !id.bytes().all(plain) {
                    return Err(Refused::Malformed);
                }
                let sent_at: i64 = timestamp.parse().map_err(|_| Refused::Malformed)?;
                match now.saturating_sub(sent_at) {
                    late if late > TOLERANCE_S => return Err(Refused::Stale),
                    early if early < -TOLERANCE_S => return Err(Refused::Future),
                    _ => {}
                }
                let given: Vec<Vec<u8>> = signature
                    .split(' ')
                    .take(SIGNATURES_MAX)
                    .filter_map(|one| STANDARD.decode(one.strip_prefix("v1,")?).ok())
                    .collect();
                let message = signed(id, sent_at, body);
                let is_signed = |secret: &&[u8]| {
                    let ours = hmac::sign(&Key::new(HMAC_SHA256, secret), &message);
                    given.iter().any(|given| is_same(ours.as_ref(), given))
                };
                if !secrets.iter().any(is_signed) {
                    return Err(Refused::WrongSignature);
                }
                Ok(Message { id: id.to_owned(), sent_at: Some(sent_at) })
            }
            Self::GitHub { signature } => {
                let given = signature.strip_prefix("sha256=").and_then(unhex).ok_or(Refused::Malformed)?;
                if !secrets.iter().any(|secret| holds(written(secret).as_bytes(), body, &given)) {
                    return Err(Refused::WrongSignature);
                }
                // Its delivery's id is not signed: whoever has seen it could send it under another.
                Ok(Message { id: hex(&sha256(body)), sent_at: None })
            }
        }
    }
}

/// In constant time: what is compared is what nobody can choose.
fn is_same(ours: &[u8], given: &[u8]) -> bool {
    let key = Key::new(HMAC_SHA256, b"compare");
    hmac::verify(&key, ours, hmac::sign(&key, given).as_ref()).is_ok()
}

/// In constant time.
fn holds(secret: &[u8], message: &[u8], given: &[u8]) -> bool {
    hmac::verify(&Key::new(HMAC_SHA256, secret), message, given).is_ok()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: i64 = 1_614_265_330;
    const BODY: &[u8] = br#"{"test": 2432232314}"#;

    fn secret() -> Vec<u8> {
        STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("base64")
    }

    fn standard<'a>(timestamp: &'a str, signature: &'a str) -> Claim<'a> {
        Claim::Standard { id: "msg_p5jXN8AQM9LWM0D4loKWxJek", timestamp, signature }
    }

    #[test]
    fn signatures_are_those_of_the_specification() {
        let ours = sign(&[&secret()], "msg_p5jXN8AQM9LWM0D4loKWxJek", NOW, BODY);
        assert_eq!(ours, VECTOR);
        let other = sign(&[&[7; 32], &secret()], "msg_p5jXN8AQM9LWM0D4loKWxJek", NOW, BODY);
        for signature in [ours, other, format!("v2,xx v1,?? {VECTOR}")] {
            let verified = standard("1614265330", &signature).verify(&[&secret()], BODY, NOW + 299);
            assert_eq!(verified.map(|message| message.sent_at), Ok(Some(NOW)));
        }
    }

    /// What the specification's own libraries give for its example.
    const VECTOR: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn what_is_old_from_the_future_forged_or_malformed_is_refused() {
        let verify = |timestamp: &str, signature: &str, now: i64| {
            standard(timestamp, signature).verify(&[&secret()], BODY, now).map(drop)
        };
        assert_eq!(verify("1614265330", VECTOR, NOW + 301), Err(Refused::Stale));
        assert_eq!(verify("1614265330", VECTOR, NOW - 301), Err(Refused::Future));
        assert_eq!(verify("1614265331", VECTOR, NOW), Err(Refused::WrongSignature));
        for wrong in ["", "v1,", "v1,AAAA", &VECTOR[3..], "v1a,AAAA"] {
            assert_eq!(verify("1614265330", wrong, NOW), Err(Refused::WrongSignature), "{wrong}");
        }
        for wrong in ["", "now", "1e9", "99999999999999999999"] {
            assert_eq!(verify(wrong, VECTOR, NOW), Err(Refused::Malformed), "{wrong}");
        }
        assert_eq!(verify(&i64::MIN.to_string(), VECTOR, NOW), Err(Refused::Stale));
        let long = "x".repeat(256);
        // The same signature, read otherwise.
        let framed = sign(&[&secret()], "a", NOW, format!("x.{}.y", NOW + 9_000).as_bytes());
        let (id, timestamp) = (format!("a.{NOW}.x"), (NOW + 9_000).to_string());
        let claim = Claim::Standard { id: &id, timestamp: &timestamp, signature: &framed };
        assert_eq!(claim.verify(&[&secret()], b"y", NOW + 9_000), Err(Refused::Malformed));
        for id in ["", "a b", "ä", "a.b", long.as_str()] {
            let claim = Claim::Standard { id, timestamp: "1614265330", signature: VECTOR };
            assert_eq!(claim.verify(&[&secret()], BODY, NOW).map(drop), Err(Refused::Malformed), "{id}");
        }
        let other = standard("1614265330", VECTOR).verify(&[&[7; 32]], BODY, NOW);
        assert_eq!(other, Err(Refused::WrongSignature));
    }

    #[test]
    fn githubs_signature_is_over_the_body_alone() {
        // The example of GitHub's own documentation.
        let example = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        assert_eq!(github(b"It's a Secret to Everybody", b"Hello, World!"), example);
        let (secret, body): (&[u8], &[u8]) = (&[7; 32], b"Hello, World!");
        let signature = sign_as_github(secret, body);
        let claim = Claim::GitHub { signature: &signature };
        assert_eq!(claim.verify(&[secret], body, NOW).map(|taken| taken.id), Ok(hex(&sha256(body))));
        assert_eq!(claim.verify(&[secret], b"Hello, World?", NOW), Err(Refused::WrongSignature));
        for signature in ["", "sha1=00", "sha256=0", "sha256=zz", "sha256=ää"] {
            assert_eq!(Claim::GitHub { signature }.verify(&[secret], b"", NOW), Err(Refused::Malformed), "{signature}");
        }
    }

    proptest! {
        #[test]
        fn what_is_signed_is_taken_and_nothing_else(body in ".*", id in "[a-zA-Z0-9_-]{1,40}", at in 0i64..4_000_000_000, flip in 0usize..64) {
            let secret = [3; 32];
            let (signature, timestamp) = (sign(&[&secret], &id, at, body.as_bytes()), at.to_string());
            let claim = Claim::Standard { id: &id, timestamp: &timestamp, signature: &signature };
            prop_assert!(claim.verify(&[&secret], body.as_bytes(), at).is_ok());
            let mut other = body.into_bytes();
            other.push(b'x');
            let at = flip % other.len();
            other[at] ^= 1;
            prop_assert!(claim.verify(&[&secret], &other, timestamp.parse().unwrap_or(0)).is_err());
        }
    }
}
