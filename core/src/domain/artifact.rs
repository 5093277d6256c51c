//! Artifacts: what steps say that is too large to be kept inline. Each is named by its
//! digest; in its place stands a reference, which is passed on like any other value.

use std::cmp::Reverse;

use serde_json::{Value, json};

use super::digest::{hex, sha256};
use super::storable::{ESCAPE_BYTES_MAX, OUTPUT_BYTES_MAX, json_bytes, size_of};

/// The largest artifact, in bytes.
pub const ARTIFACT_BYTES_MAX: usize = 100 * 1024 * 1024;
/// What the artifacts of a run may come to together, in bytes.
pub const RUN_ARTIFACTS_BYTES_MAX: i64 = 1024 * 1024 * 1024;
/// How many values of an output may be artifacts; of one with more large ones the whole is.
const PARTS_MAX: usize = 8;
/// What a reference takes at most, in bytes of JSON.
const REFERENCE_BYTES_MAX: usize = 512;
/// The longest content type, in characters.
const CONTENT_TYPE_CHARS_MAX: usize = 200;
/// JSON.
pub const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// Bytes of which nothing is known.
pub const BINARY: &str = "application/octet-stream";

/// A reference to an artifact: `{"artifact": "<sha256>", "bytes": n, "content_type": "…"}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The SHA-256 of its bytes, in lower-case hexadecimal.
    pub sha256: String,
    /// How many bytes.
    pub bytes: usize,
    /// What they are, as a media type.
    pub content_type: String,
}

impl Artifact {
    /// The reference to some bytes.
    pub fn of_bytes(bytes: &[u8], content_type: &str) -> Self {
        let known = content_type.len() <= CONTENT_TYPE_CHARS_MAX
            && content_type.contains('/')
            && content_type.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        let content_type = if known { content_type } else { BINARY }.to_owned();
        Self { sha256: hex(&sha256(bytes)), bytes: bytes.len(), content_type }
    }

    /// The artifact that a value refers to, if it is a reference.
    pub fn of(value: &Value) -> Option<Self> {
        let map = value.as_object().filter(|map| map.len() == 3)?;
        let artifact = Self {
            sha256: map.get("artifact")?.as_str()?.to_owned(),
            bytes: usize::try_from(map.get("bytes")?.as_u64()?).ok()?,
            content_type: map.get("content_type")?.as_str()?.to_owned(),
        };
        is_digest(&artifact.sha256).then_some(artifact)
    }

    /// The reference as a value.
    pub fn to_value(&self) -> Value {
        json!({"artifact": self.sha256, "bytes": self.bytes, "content_type": self.content_type})
    }
}

/// Whether a text may be the digest of an artifact.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Takes out of an output what is too large to be kept inline, and leaves references:
/// the largest of its values, where a few are what makes it large, and else the whole.
/// Gives what is to be stored.
pub fn take_out(output: &mut Value) -> Vec<(Artifact, Vec<u8>)> {
    // Most outputs are small, and need not be written out to be measured.
    if size_of(output) * ESCAPE_BYTES_MAX <= OUTPUT_BYTES_MAX {
        return Vec::new();
    }
    let mut bytes = json_bytes(output);
    if bytes <= OUTPUT_BYTES_MAX {
        return Vec::new();
    }
    if let Value::Object(map) = output {
        let mut parts: Vec<(usize, &mut Value)> = map.values_mut().map(|value| (json_bytes(value), value)).collect();
        parts.sort_by_key(|(size, _)| Reverse(*size));
        let enough = parts.iter().take(PARTS_MAX).position(|(size, _)| {
            bytes = (bytes + REFERENCE_BYTES_MAX).saturating_sub(*size);
            bytes <= OUTPUT_BYTES_MAX
        });
        if let Some(last) = enough {
            return parts.into_iter().take(last + 1).map(|(_, part)| take(part)).collect();
        }
    }
    vec![take(output)]
}

fn take(part: &mut Value) -> (Artifact, Vec<u8>) {
    let (bytes, content_type) = match part.take() {
        Value::String(text) => (text.into_bytes(), TEXT),
        other => (other.to_string().into_bytes(), JSON),
    };
    let artifact = Artifact::of_bytes(&bytes, content_type);
    *part = artifact.to_value();
    (artifact, bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reference_is_told_from_other_values() {
        let artifact = Artifact::of_bytes(b"x", "image/png");
        assert_eq!(Artifact::of(&artifact.to_value()), Some(artifact.clone()));
        let mut other = artifact.to_value();
        other["more"] = json!(1);
        for value in [json!({}), json!("x"), other, json!({"artifact": "x", "bytes": 1, "content_type": "a/b"})] {
            assert_eq!(Artifact::of(&value), None);
        }
        for wrong in ["", "nonsense", "a/b\r\nx: y", &"a/".repeat(200)] {
            assert_eq!(Artifact::of_bytes(b"", wrong).content_type, BINARY);
        }
    }

    #[test]
    fn what_has_no_names_goes_whole_and_what_is_large_goes_first() {
        let large = "\n".repeat(OUTPUT_BYTES_MAX / 2);
        let mut output = json!({"status": 200, "body": large, "title": "x".repeat(2_000)});
        let taken = take_out(&mut output);
        assert_eq!((taken.len(), taken[0].1.len()), (1, large.len()));
        assert_eq!((&output["status"], output["title"].as_str().map(str::len)), (&json!(200), Some(2_000)));
        assert_eq!(Artifact::of(&output["body"]).expect("a reference").content_type, TEXT);
        for mut whole in [json!(large), json!([large]), json!(vec![1_234_567; 50_000])] {
            let before = whole.clone();
            let taken = take_out(&mut whole);
            let content = match before {
                Value::String(text) => text,
                other => other.to_string(),
            };
            assert_eq!(taken[0].1, content.into_bytes());
            assert_eq!(Artifact::of(&whole), Some(taken[0].0.clone()));
        }
        let many: serde_json::Map<String, Value> = (0..30_000).map(|n| (format!("k{n}"), json!(n))).collect();
        let mut many = Value::Object(many);
        assert_eq!(take_out(&mut many).len(), 1);
        assert!(Artifact::of(&many).is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn whatever_an_output_is_it_fits_and_nothing_is_lost(
            sizes in proptest::collection::vec(0_usize..200_000, 1..8),
            fill in prop_oneof![Just("a"), Just("\""), Just("\u{1}"), Just("é")],
        ) {
            let map: serde_json::Map<String, Value> =
                sizes.iter().enumerate().map(|(n, size)| (format!("k{n}"), json!(fill.repeat(*size)))).collect();
            let before = Value::Object(map);
            let mut output = before.clone();
            let taken = take_out(&mut output);
            prop_assert!(output.to_string().len() <= OUTPUT_BYTES_MAX);
            prop_assert_eq!(taken.is_empty(), before.to_string().len() <= OUTPUT_BYTES_MAX);
            for (name, was) in before.as_object().expect("a map") {
                let is = match Artifact::of(&output[name]) {
                    None => output[name].clone(),
                    Some(artifact) => {
                        let of_it = taken.iter().find(|(other, _)| *other == artifact).expect("its bytes");
                        json!(String::from_utf8(of_it.1.clone()).expect("text"))
                    }
                };
                prop_assert_eq!(&is, was);
            }
        }
    }
}
