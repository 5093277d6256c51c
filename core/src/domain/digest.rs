//! Digests of what must not change unseen: keys, playbook texts, the exact
//! thing an approver was shown.

use sha2::{Digest, Sha256};

/// SHA-256.
pub fn sha256(bytes: impl AsRef<[u8]>) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The key that an outgoing call of a step carries: the same over retries and
/// takeovers, another for every step of every run, and for every time that a
/// loop comes to it: `round` is how often the run has jumped. Of a step that is
/// done for a list, each item has another.
pub fn idempotency_key(run: super::ids::RunId, step_id: &str, round: u32, item: Option<usize>) -> String {
    let again = if round > 0 { format!("\0{round}") } else { String::new() };
    let item = item.map(|item| format!("\0item\0{item}")).unwrap_or_default();
    hex(&sha256(format!("capx/effect/v1\0{run}\0{step_id}{again}{item}"))[..16])
}

/// That of another draft of a step for its rubric, and of the grading of one: `of` is
/// the key of the step itself, `before` how many drafts there were before.
pub fn draft_key(of: String, before: u32, grades: bool) -> String {
    match (before, grades) {
        (0, false) => of,
        _ => hex(&sha256(format!("capx/draft/v1\0{of}\0{before}\0{grades}"))[..16]),
    }
}

/// That of a call inside an agent's work: `of` is the key of the work, which the first turn
/// of the model carries itself.
pub fn call_key(of: &str, turn: u32, call: u32) -> String {
    match (turn, call) {
        (0, 0) => of.to_owned(),
        _ => hex(&sha256(format!("capx/call/v1\0{of}\0{turn}\0{call}"))[..16]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::RunId;

    #[test]
    fn an_effect_key_is_stable_and_particular() {
        let (a, b) = (RunId::new(), RunId::new());
        let key = |run, step, round| idempotency_key(run, step, round, None);
        assert_eq!(key(a, "x", 0), key(a, "x", 0));
        assert_ne!(key(a, "x", 0), key(a, "y", 0));
        assert_ne!(key(a, "x", 0), key(b, "x", 0));
        assert_ne!(key(a, "x", 0), key(a, "x", 1));
        assert_ne!(key(a, "x", 2), key(a, "x", 1));
        let item = |round, item| idempotency_key(a, "x", round, Some(item));
        assert_eq!(item(0, 1), item(0, 1));
        assert_ne!(item(0, 1), item(0, 2));
        assert_ne!(item(0, 1), item(1, 1));
        assert_ne!(item(0, 1), key(a, "x", 1));
        let draft = |before, grades| draft_key(key(a, "x", 0), before, grades);
        assert_eq!(draft(0, false), key(a, "x", 0));
        assert!(draft(0, true) != draft(1, true) && draft(1, false) != draft(1, true));
        assert_ne!(draft(0, true), draft(0, false));
        assert_eq!(hex(&sha256("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
