//! The one gate that every stored value passes: what Postgres could not keep
//! must become a failed step with a reason, never a stuck run (hazard H17).

use std::io;

use serde_json::Value;

/// The largest output that is kept inline, in bytes of JSON.
pub const OUTPUT_BYTES_MAX: usize = 256 * 1024;
/// How deep a stored value may nest.
pub const DEPTH_MAX: usize = 64;

/// How many bytes of JSON a byte of text takes at most: `\u0001`.
pub const ESCAPE_BYTES_MAX: usize = 6;

/// Why a value cannot be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unstorable {
    /// Postgres refuses U+0000 in JSON text.
    #[error("holds a NUL character at {0}, which cannot be stored; remove it or encode the text")]
    Nul(String),
    /// Deeper than [`DEPTH_MAX`].
    #[error("nests deeper than {DEPTH_MAX} levels")]
    Deep,
    /// Larger than the limit for its place.
    #[error("is {bytes} bytes of JSON, over the limit of {limit}")]
    Large {
        /// Its size.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
}

/// Puts U+FFFD where a text holds a NUL: for what others have said and is kept as it is.
pub fn without_nul(value: &mut Value) {
    match value {
        Value::String(text) if text.contains('\0') => *text = text.replace('\0', "\u{fffd}"),
        Value::Array(items) => items.iter_mut().for_each(without_nul),
        Value::Object(map) => {
            if map.keys().any(|key| key.contains('\0')) {
                *map = std::mem::take(map)
                    .into_iter()
                    .map(|(key, value)| (key.replace('\0', "\u{fffd}"), value))
                    .collect();
            }
            map.values_mut().for_each(without_nul);
        }
        _ => {}
    }
}

/// Checks a value and gives its JSON text, at most `limit` bytes.
pub fn to_json(value: &Value, limit: usize) -> Result<String, Unstorable> {
    check(value, &mut String::from("$"), 0)?;
    let text = value.to_string();
    if text.len() > limit {
        return Err(Unstorable::Large { bytes: text.len(), limit });
    }
    Ok(text)
}

fn check(value: &Value, path: &mut String, depth: usize) -> Result<(), Unstorable> {
    if depth > DEPTH_MAX {
        return Err(Unstorable::Deep);
    }
    match value {
        Value::String(text) if text.contains('\0') => Err(Unstorable::Nul(path.clone())),
        Value::Array(items) => {
            let base = path.len();
            items.iter().enumerate().try_for_each(|(i, item)| {
                path.push_str(&format!("[{i}]"));
                check(item, path, depth + 1)?;
                path.truncate(base);
                Ok(())
            })
        }
        Value::Object(map) => {
            let base = path.len();
            map.iter().try_for_each(|(key, item)| {
                if key.contains('\0') {
                    return Err(Unstorable::Nul(format!("{path} (a key)")));
                }
                path.push('.');
                path.push_str(key);
                check(item, path, depth + 1)?;
                path.truncate(base);
                Ok(())
            })
        }
        _ => Ok(()),
    }
}

/// About as many bytes as a value's JSON has, without what is escaped in its texts: fast.
pub fn size_of(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => 2 + items.iter().map(|item| size_of(item) + 1).sum::<usize>(),
        Value::Object(map) => 2 + map.iter().map(|(key, item)| key.len() + size_of(item) + 4).sum::<usize>(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
    }
}

/// How many bytes a value's JSON has.
pub fn json_bytes(value: &Value) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Nothing can fail that only counts.
    let _ = serde_json::to_writer(&mut count, value);
    count.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn says_where_the_nul_is() {
        let value = json!({"a": ["x", {"b": "y\0z"}]});
        assert_eq!(to_json(&value, 100), Err(Unstorable::Nul("$.a[1].b".into())));
        assert!(matches!(to_json(&json!({"k\0": 1}), 100), Err(Unstorable::Nul(_))));
    }

    #[test]
    fn a_size_is_about_that_of_the_json() {
        for value in [json!({"a": ["x", 1, null], "long": "y".repeat(1_000)}), json!([]), json!("text")] {
            let (estimated, real) = (size_of(&value), value.to_string().len());
            assert!(estimated >= real && estimated <= real + 32, "{estimated} for {real}");
        }
    }

    #[test]
    fn holds_size_and_depth() {
        assert_eq!(to_json(&json!("x".repeat(20)), 10), Err(Unstorable::Large { bytes: 22, limit: 10 }));
        let deep = (0..=DEPTH_MAX).fold(json!(1), |inner, _| json!([inner]));
        assert_eq!(to_json(&deep, 1_000_000), Err(Unstorable::Deep));
        assert_eq!(to_json(&json!({"a": 1}), 100).as_deref(), Ok("{\"a\":1}"));
    }
}
