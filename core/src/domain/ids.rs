//! Typed ids: a UUIDv7 inside, shown as a prefix and 26 characters of
//! lower-case Crockford base32 (the TypeID form), e.g. `run_01hz…`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// 128 bits in groups of five.
const ENCODED_CHARS: usize = 26;

/// A text that is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {prefix}_… id")]
pub struct InvalidId {
    prefix: &'static str,
}

fn encode(value: u128, out: &mut [u8; ENCODED_CHARS]) {
    let mut rest = value;
    for slot in out.iter_mut().rev() {
        *slot = ALPHABET[(rest & 31) as usize];
        rest >>= 5;
    }
}

fn decode(text: &str) -> Option<u128> {
    if text.len() != ENCODED_CHARS {
        return None;
    }
    let mut value: u128 = 0;
    for (i, byte) in text.bytes().enumerate() {
        let digit = ALPHABET.iter().position(|a| *a == byte)? as u128;
        // 26 digits hold 130 bits: the first may only use its low three.
        if i == 0 && digit > 7 {
            return None;
        }
        value = (value << 5) | digit;
    }
    Some(value)
}

macro_rules! typed_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl $name {
            /// What the shown form begins with, before the underscore.
            pub const PREFIX: &'static str = $prefix;

            /// A new id; later ones sort after earlier ones.
            #[allow(clippy::new_without_default, reason = "a default id would be a trap")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut text = [0; ENCODED_CHARS];
                encode(self.0.as_u128(), &mut text);
                f.write_str(concat!($prefix, "_"))?;
                f.write_str(std::str::from_utf8(&text).unwrap_or_default())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                text.strip_prefix(concat!($prefix, "_"))
                    .and_then(decode)
                    .map(|value| Self(Uuid::from_u128(value)))
                    .ok_or(InvalidId { prefix: $prefix })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

typed_id!(/// Who pays and owns companies.
    AccountId, "acc");
typed_id!(/// One API key.
    KeyId, "key");
typed_id!(/// A company: the unit of isolation.
    CompanyId, "co");
typed_id!(/// An agent of a company.
    AgentId, "ag");
typed_id!(/// A playbook, over all its versions.
    PlaybookId, "pb");
typed_id!(/// One immutable version of a playbook.
    VersionId, "pbv");
typed_id!(/// One execution of a playbook.
    RunId, "run");
typed_id!(/// One entry of the activity log.
    EventId, "evt");
typed_id!(/// A gate that waits for a person.
    ApprovalId, "apr");
typed_id!(/// A piece of work for an agent.
    TaskId, "tsk");
typed_id!(/// A job that gave up.
    DeadLetterId, "dl");
typed_id!(/// An address that is told of events.
    WebhookId, "wh");
typed_id!(/// An event on its way to a webhook.
    DeliveryId, "dlv");
typed_id!(/// A named event that a client has sent.
    SignalId, "sig");
typed_id!(/// Dead letters that are tried again, so many a second.
    RedriveId, "rdr");
typed_id!(/// A message among agents.
    MessageId, "msg");
typed_id!(/// One request to the API.
    RequestId, "req");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_reads_back_and_sorts_like_its_value(a: u128, b: u128) {
            let (x, y) = (RunId(Uuid::from_u128(a)), RunId(Uuid::from_u128(b)));
            prop_assert_eq!(x.to_string().parse::<RunId>(), Ok(x));
            prop_assert_eq!(x.to_string().cmp(&y.to_string()), a.cmp(&b));
        }

        #[test]
        fn any_text_is_an_id_or_an_error(text in ".{0,40}") {
            if let Ok(id) = text.parse::<RunId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn another_kind_upper_case_and_overflow_are_refused() {
        let id = CompanyId::new().to_string();
        assert!(id.parse::<RunId>().is_err());
        assert!(id.to_uppercase().parse::<CompanyId>().is_err());
        assert!(format!("co_8{}", "0".repeat(25)).parse::<CompanyId>().is_err());
    }
}
