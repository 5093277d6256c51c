//! What went through queues, counted here and written now and then: rates that nobody has to count
//! rows for.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What was done is written no more often than this.
const WRITTEN: Duration = Duration::from_secs(5);

/// What went through queues since that was last written.
#[derive(Debug, Default)]
pub(crate) struct Done(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    written: Option<Instant>,
    /// Of each queue: what was done, and what is to come again.
    queues: HashMap<String, (i64, i64)>,
}

impl Done {
    /// A job of a queue was done, or is to come again.
    pub(super) fn add(&self, queue: &str, again: bool) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match counts.queues.get_mut(queue) {
            Some(entry) => entry,
            None => counts.queues.entry(queue.to_owned()).or_default(),
        };
        *(if again { &mut entry.1 } else { &mut entry.0 }) += 1;
    }

    /// What there is to write, if it is time.
    pub(super) fn take(&self) -> Vec<(String, i64, i64)> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.queues.is_empty() || counts.written.is_some_and(|at| at.elapsed() < WRITTEN) {
            return Vec::new();
        }
        counts.written = Some(Instant::now());
        std::mem::take(&mut counts.queues).into_iter().map(|(queue, (done, again))| (queue, done, again)).collect()
    }
}
