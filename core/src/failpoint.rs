//! Named points in the code where a test build can crash, pause or fail.
//!
//! Behind the cargo feature `failpoints`; without it a point is nothing at
//! all. A process takes its orders from `CAPX_FAILPOINTS`, a list of
//! `point=action@hit` parted by commas: at the given hit (counted from 1,
//! every hit without one) the point acts. Actions: `kill` (SIGKILL to the own
//! process, nothing is unwound), `fail` (an error, where the point is one
//! that can fail), `sleep:MS`. Every act is told on stderr as `failpoint
//! fired: POINT`, so that a test can assert that its fault happened.

#[cfg(feature = "failpoints")]
mod active {
    use std::collections::HashMap;
    use std::sync::{Mutex, OnceLock};
    use std::time::Duration;

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Action {
        Kill,
        Fail,
        Sleep(Duration),
    }

    struct Point {
        action: Action,
        at: Option<u64>,
        hits: u64,
    }

    fn points() -> &'static Mutex<HashMap<String, Point>> {
        static POINTS: OnceLock<Mutex<HashMap<String, Point>>> = OnceLock::new();
        POINTS.get_or_init(|| {
            let orders = std::env::var("CAPX_FAILPOINTS").unwrap_or_default();
            Mutex::new(orders.split(',').filter_map(parse).collect())
        })
    }

    fn parse(order: &str) -> Option<(String, Point)> {
        let (name, rest) = order.trim().split_once('=')?;
        let (action, at) = match rest.split_once('@') {
            Some((action, at)) => (action, Some(at.parse().ok()?)),
            None => (rest, None),
        };
        let action = match action.split_once(':') {
            Some(("sleep", ms)) => Action::Sleep(Duration::from_millis(ms.parse().ok()?)),
            _ if action == "kill" => Action::Kill,
            _ if action == "fail" => Action::Fail,
            _ => return None,
        };
        Some((name.to_owned(), Point { action, at, hits: 0 }))
    }

    fn hit(name: &str) -> Option<Action> {
        let mut points = points().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let point = points.get_mut(name)?;
        point.hits += 1;
        point.at.is_none_or(|at| at == point.hits).then_some(point.action)
    }

    #[expect(clippy::print_stderr, reason = "the evidence that a fault happened")]
    pub(super) async fn reach(name: &'static str) -> bool {
        let Some(action) = hit(name) else { return false };
        eprintln!("failpoint fired: {name}");
        match action {
            Action::Fail => true,
            Action::Sleep(time) => {
                tokio::time::sleep(time).await;
                false
            }
            Action::Kill => {
                // SIGKILL: no destructor, no flush, no goodbye.
                let pid = std::process::id().to_string();
                let _ = std::process::Command::new("kill").args(["-9", &pid]).status();
                std::process::abort()
            }
        }
    }
}

/// Passes a named point; true when a test wants the operation to fail here.
#[cfg(feature = "failpoints")]
pub async fn reach(name: &'static str) -> bool {
    active::reach(name).await
}

/// Passes a named point: nothing, without the feature.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub async fn reach(_name: &'static str) -> bool {
    false
}

/// Every point, for the test that walks them all.
pub const POINTS: &[&str] = &[
    "start.before_commit",
    "start.after_commit",
    "claim.before",
    "claim.after_commit",
    "load.before",
    "attempt.before_handler",
    "attempt.after_handler",
    "commit.before",
    "commit.after",
    "settle.before",
    "settle.after",
    "promote.before",
    "promote.after",
    "session.opened",
    "session.before_end",
    "sweep.before",
    "sweep.buried",
    "sweep.after_commit",
    "command.before_commit",
    "command.after_commit",
    "expire.before_commit",
    "expire.after_commit",
    "fire.before_start",
    "fire.before_commit",
    "fire.after_commit",
    "call.before_commit",
    "call.after_commit",
    "artifact.booked",
    "agent.turn_left",
    "artifact.in_part",
    "artifact.stored",
    "agent.turn_begun",
    "agent.turn_answered",
    "agent.turn_stored",
    "agent.call_begun",
    "agent.call_made",
    "agent.call_stored",
    "beat.before_commit",
    "beat.after_commit",
    "admit.before_commit",
    "admit.after_commit",
    "delivery.sent",
    "delivery.before_commit",
    "delivery.after_commit",
];
