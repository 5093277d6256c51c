//! Sealing: ChaCha20-Poly1305 of RFC 8439 under one of a few keys, which are not in the
//! database. What is sealed names its key, so that keys can be changed one by one, and
//! is bound to its company and name, so that no row can stand in for another.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use crate::domain::digest;
use crate::domain::ids::CompanyId;

/// How many keys there may be: the one that seals, and those that only open.
pub const KEYS_MAX: usize = 20;
const KEY_BYTES: usize = 32;

/// A secret as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The key that opens it.
    pub key: String,
    /// The nonce, the ciphertext and its tag.
    pub bytes: Vec<u8>,
}

/// Why something is not sealed or opened; says nothing of what is inside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The keys are not as they should be.
    #[error("line {line} of the keys {what}; `capx secret key` makes one")]
    Keys {
        /// Which, from 1.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// There is none.
    #[error(
        "no key for secrets is configured; set CAPX_SECRETS_KEY_FILE to a file with the line that `capx secret key` prints, for the API and the workers"
    )]
    NoKey,
    /// What was sealed with one that is gone.
    #[error("it is sealed with the key `{0}`, which is not among those that are configured")]
    UnknownKey(String),
    /// It was changed, or belongs elsewhere.
    #[error("it does not open with its key `{0}`: it was changed, or the key is another one with the same id")]
    Broken(String),
    /// The machine gave no random bytes, or the value is beyond measure.
    #[error("it could not be sealed")]
    Failed,
}

/// The keys: the first one seals, all open.
#[derive(Default)]
pub struct Keys(Vec<Key>);

struct Key {
    id: String,
    seals: LessSafeKey,
    digests: hmac::Key,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.id)).finish()
    }
}

impl Keys {
    /// From lines, or parts between commas, of `id:base64 of 32 bytes`.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let lines = text.split(['\n', ',']).map(str::trim).enumerate();
        let mut keys: Vec<Key> = Vec::new();
        for (at, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let wrong = |what| SealError::Keys { line: at + 1, what };
            let (id, key) = line.split_once(':').ok_or_else(|| wrong("is no `id:key`"))?;
            let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            if id.is_empty() || id.len() > 32 || !id.chars().all(known) {
                return Err(wrong("has no id of up to 32 letters, digits, `_` and `-`"));
            }
            if keys.iter().any(|other| other.id == id) {
                return Err(wrong("has the id of another"));
            }
            if keys.len() == KEYS_MAX {
                return Err(wrong("is one too many: there may be 20"));
            }
            let bytes = STANDARD.decode(key).ok().filter(|key| key.len() == KEY_BYTES);
            let bytes = bytes.ok_or_else(|| wrong("is no base64 of 32 bytes behind its id"))?;
            let seals = UnboundKey::new(&CHACHA20_POLY1305, &bytes).map_err(|_| SealError::Failed)?;
            // A key for one use each.
            let digests = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &bytes), b"capx/digest/v1");
            let digests = hmac::Key::new(hmac::HMAC_SHA256, digests.as_ref());
            keys.push(Key { id: id.to_owned(), seals: LessSafeKey::new(seals), digests });
        }
        Ok(Self(keys))
    }

    /// The id of the one that seals.
    pub fn first(&self) -> Option<&str> {
        self.0.first().map(|key| key.id.as_str())
    }

    /// A digest of what holds a secret, from which nobody without the key finds it by
    /// trying.
    pub fn digest(&self, of: [u8; 32]) -> Result<[u8; 32], SealError> {
        let key = self.0.first().ok_or(SealError::NoKey)?;
        hmac::sign(&key.digests, &of).as_ref().try_into().map_err(|_| SealError::Failed)
    }

    /// Seals the secret of a company.
    pub fn seal(&self, company: CompanyId, name: &str, value: &str) -> Result<Sealed, SealError> {
        let Key { id, seals, .. } = self.0.first().ok_or(SealError::NoKey)?;
        let nonce: [u8; NONCE_LEN] = random()?;
        let mut sealed = value.as_bytes().to_vec();
        seals
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound_to(company, name, id), &mut sealed)
            .map_err(|_| SealError::Failed)?;
        Ok(Sealed { key: id.clone(), bytes: [nonce.as_slice(), &sealed].concat() })
    }

    /// Opens it.
    pub fn open(&self, company: CompanyId, name: &str, sealed: &Sealed) -> Result<String, SealError> {
        if self.0.is_empty() {
            return Err(SealError::NoKey);
        }
        let id = &sealed.key;
        let key = self.0.iter().find(|key| key.id == *id).ok_or_else(|| SealError::UnknownKey(id.clone()))?;
        let broken = || SealError::Broken(id.clone());
        let (nonce, inside) = sealed.bytes.split_at_checked(NONCE_LEN).ok_or_else(broken)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| broken())?;
        let mut inside = inside.to_vec();
        let value = key.seals.open_in_place(nonce, bound_to(company, name, id), &mut inside).map_err(|_| broken())?;
        String::from_utf8(value.to_vec()).map_err(|_| broken())
    }
}

/// A line of another key, with an id by which nobody has called one before.
pub fn new_key() -> Result<String, SealError> {
    let (id, key): ([u8; 4], [u8; KEY_BYTES]) = (random()?, random()?);
    Ok(format!("k{}:{}", digest::hex(&id), STANDARD.encode(key)))
}

fn bound_to(company: CompanyId, name: &str, key: &str) -> Aad<String> {
    Aad::from(format!("capx/secret/v1\0{company}\0{name}\0{key}"))
}

fn random<const N: usize>() -> Result<[u8; N], SealError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| SealError::Failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_where_it_belongs_and_nowhere_else() {
        let (old, new) = (new_key().expect("a key"), new_key().expect("a key"));
        let keys = Keys::parse(&old).expect("keys");
        let (company, other) = (CompanyId::new(), CompanyId::new());
        let sealed = keys.seal(company, "A", "hunter-22").expect("sealed");
        assert_ne!(sealed, keys.seal(company, "A", "hunter-22").expect("sealed"), "the nonce was used before");
        assert_eq!(keys.open(company, "A", &sealed).as_deref(), Ok("hunter-22"));
        let id = sealed.key.clone();
        assert_eq!(keys.open(other, "A", &sealed), Err(SealError::Broken(id.clone())));
        assert_eq!(keys.open(company, "B", &sealed), Err(SealError::Broken(id.clone())));
        for at in 0..sealed.bytes.len() {
            let mut changed = sealed.clone();
            changed.bytes[at] ^= 1;
            assert_eq!(keys.open(company, "A", &changed), Err(SealError::Broken(id.clone())));
            changed.bytes.truncate(at);
            assert_eq!(keys.open(company, "A", &changed), Err(SealError::Broken(id.clone())));
        }
        // The next key seals, and the old one opens until it is gone.
        let both = Keys::parse(&format!("# the next\n{new}\n{old}\n")).expect("keys");
        assert_eq!(both.open(company, "A", &sealed).as_deref(), Ok("hunter-22"));
        let again = both.seal(company, "A", "hunter-22").expect("sealed");
        let only = Keys::parse(&new).expect("keys");
        assert_eq!(only.open(company, "A", &again).as_deref(), Ok("hunter-22"));
        assert_eq!(only.open(company, "A", &sealed), Err(SealError::UnknownKey(id)));
        assert_eq!(Keys::default().open(company, "A", &sealed), Err(SealError::NoKey));
        assert_eq!(Keys::default().seal(company, "A", "hunter-22"), Err(SealError::NoKey));
    }

    #[test]
    fn wrong_keys_are_told_by_line_and_never_shown() {
        let good = new_key().expect("a key");
        for (text, line) in [
            ("hunter".to_owned(), 1),
            (format!("{good}\nk2:aGVsbG8="), 2),
            (format!("{good},{good}"), 2),
            (format!(":{}", good.split_once(':').expect("a key").1), 1),
            ("k:!".to_owned(), 1),
        ] {
            let error = Keys::parse(&text).expect_err(&text);
            assert!(matches!(&error, SealError::Keys { line: at, .. } if *at == line), "{error}");
            assert!(!error.to_string().contains("hunter"));
        }
        assert_eq!(Keys::parse(" \n# none\n").expect("none").first(), None);
        assert!(!format!("{:?}", Keys::parse(&good)).contains(good.split_once(':').expect("a key").1));
    }
}
