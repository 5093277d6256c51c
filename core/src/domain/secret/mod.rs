//! Secrets of companies: sealed at rest, opened for the tool that needs one, and taken
//! out of all that comes back (hazard S13).

use std::fmt;

use serde_json::{Map, Value};

use super::outcome::Outcome;
use redact::Redactor;

pub mod redact;
pub mod seal;

/// How long a name may be.
pub const NAME_CHARS_MAX: usize = 64;
/// How short a secret may be, in bytes: a shorter one is not to be told from other text,
/// nor hard to guess.
pub const VALUE_BYTES_MIN: usize = 8;
/// How long it may be, in bytes: a key with its certificates.
pub const VALUE_BYTES_MAX: usize = 16 * 1024;
/// How many a company may have.
pub const SECRETS_MAX: i64 = 200;
/// How many a playbook may name.
pub const NAMED_MAX: usize = 20;

/// What is wrong with a name, or nothing.
pub fn name_problem(name: &str) -> Option<String> {
    let known = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(known);
    (!good || name.len() > NAME_CHARS_MAX).then(|| {
        format!("must be up to {NAME_CHARS_MAX} letters, digits and `_`, the first a letter, such as `STRIPE_KEY`")
    })
}

/// What is wrong with a value, or nothing; says nothing of what it is.
pub fn value_problem(value: &str) -> Option<String> {
    if !(VALUE_BYTES_MIN..=VALUE_BYTES_MAX).contains(&value.len()) {
        return Some(format!("must be {VALUE_BYTES_MIN} to {VALUE_BYTES_MAX} bytes"));
    }
    value.contains('\0').then(|| "must not hold a NUL character".to_owned())
}

/// What stands for a secret wherever people, models or other steps look.
pub fn mask(name: &str) -> String {
    format!("[secret {name}]")
}

/// The opened secrets of a run.
pub struct Secrets {
    values: Map<String, Value>,
    redactor: Redactor,
}

impl Secrets {
    /// Some by their names; nothing where they could not be taken out again.
    pub fn new(secrets: Vec<(String, String)>) -> Option<Self> {
        let redactor = Redactor::new(&secrets)?;
        Some(Self { values: secrets.into_iter().map(|(name, value)| (name, value.into())).collect(), redactor })
    }

    /// What `secrets.NAME` looks up, where a tool gets it.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// What takes them out.
    pub fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// An outcome without them.
    pub fn redact(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Done { mut output, cost } => {
                self.redactor.value(&mut output);
                Outcome::Done { output, cost }
            }
            Outcome::Failed { mut failure, cost } => {
                self.redactor.text(&mut failure.message);
                Outcome::Failed { failure, cost }
            }
            other => other,
        }
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_told_what_is_wrong_with_them() {
        for name in ["a", "STRIPE_KEY", "x1", &"a".repeat(64)] {
            assert_eq!(name_problem(name), None, "{name}");
        }
        for name in ["", "1a", "_a", "a-b", "a.b", "ä", &"a".repeat(65)] {
            assert!(name_problem(name).is_some(), "{name}");
        }
        assert_eq!(value_problem("hunter22"), None);
        for value in ["", "hunter2", "hunter\0 22", &"x".repeat(VALUE_BYTES_MAX + 1)] {
            assert!(!value_problem(value).expect(value).contains("hunter"));
        }
    }

    #[test]
    fn nothing_shows_them() {
        let secrets = Secrets::new(vec![("A".into(), "hunter-22-canary".into())]).expect("secrets");
        assert_eq!(format!("{secrets:?}"), "{\"A\"}");
    }
}
