//! How much a run may keep of what its steps have said.

use super::RunContext;
use crate::domain::outcome::{Failure, Outcome};
use crate::domain::storable::OUTPUT_BYTES_MAX;

/// What a run keeps of what its steps and items have said, in bytes of JSON.
pub const RUN_BYTES_MAX: i64 = 32 * 1024 * 1024;
/// From here on it is counted exactly: sixteen outputs, which is what a worker does of a
/// run in a row, before the limit.
const NEAR_BYTES: i64 = RUN_BYTES_MAX - 16 * OUTPUT_BYTES_MAX as i64;
/// The same for runs with loops, whose steps say things anew.
const LOOP_BYTES: i64 = RUN_BYTES_MAX / 8;

impl RunContext {
    /// Whether what the run keeps must be counted exactly before anything else is kept.
    pub fn is_nearly_full(&self) -> bool {
        self.bytes > if self.playbook.jumps() { LOOP_BYTES } else { NEAR_BYTES }
    }

    /// Whether the run can keep so many bytes more.
    pub fn fits(&self, more: i64) -> Result<(), Failure> {
        let bytes = self.bytes.saturating_add(more);
        if bytes <= RUN_BYTES_MAX {
            return Ok(());
        }
        Err(Failure::invalid(format!(
            "the outputs of the run would come to {bytes} bytes, over the limit of {RUN_BYTES_MAX}; let its steps say \
             less, write what is large into files, or do a part of the work in another playbook"
        )))
    }

    /// An outcome, with its output as JSON, as far as the run can keep it. What closes a
    /// run is always done.
    pub fn keep(&mut self, outcome: Outcome, output: Option<String>) -> (Outcome, Option<String>) {
        let said = output.as_ref().map_or(0, |text| i64::try_from(text.len()).unwrap_or(i64::MAX));
        let more = said.saturating_add(self.items_bytes());
        if let (Outcome::Done { cost, .. }, Some(text), None) = (&outcome, &output, &self.ending)
            && text != "null"
            && let Err(failure) = self.fits(more)
        {
            return (Outcome::Failed { failure, cost: *cost }, None);
        }
        self.bytes = self.bytes.saturating_add(more);
        (outcome, output)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::domain::ids::{CompanyId, PlaybookId, RunId};
    use crate::domain::playbook::load;

    fn context(bytes: i64) -> RunContext {
        let plan = load::load("name: x\nsteps: [{id: a, action: transform}]\n").expect("a playbook");
        let ids = (CompanyId::new(), PlaybookId::new(), RunId::new());
        RunContext { bytes, ..RunContext::new(ids.0, ids.1, ids.2, Arc::new(plan), Arc::new(json!({}))) }
    }

    #[test]
    fn what_is_said_is_counted_up_to_the_limit() {
        let text = || Some("\"x\"".to_owned());
        let mut run = context(RUN_BYTES_MAX - 4);
        assert!(run.is_nearly_full());
        let (outcome, _) = run.keep(Outcome::done(json!("x")), text());
        assert!(matches!(outcome, Outcome::Done { .. }) && run.bytes == RUN_BYTES_MAX - 1);
        let (outcome, output) = run.keep(Outcome::done(json!("x")), text());
        assert!(matches!(outcome, Outcome::Failed { .. }) && output.is_none() && run.bytes == RUN_BYTES_MAX - 1);
        // What says nothing goes on.
        let (outcome, _) = run.keep(Outcome::done(json!(null)), Some("null".into()));
        assert!(matches!(outcome, Outcome::Done { .. }));
        assert!(!context(0).is_nearly_full());
    }
}
