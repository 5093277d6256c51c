//! `capx doctor`: every limit with its name and default, in one table.

use capx_core::domain::artifact::{ARTIFACT_BYTES_MAX, RUN_ARTIFACTS_BYTES_MAX};
use capx_core::domain::duration;
use capx_core::domain::outcome::MESSAGE_CHARS_MAX;
use capx_core::domain::plan::{CRASHES_MAX, DEPTH_MAX, KEY_CHARS_MAX, RUN_BYTES_MAX};
use capx_core::domain::playbook::model::{
    APPROVAL_TIMEOUT, CONCURRENCY_MAX, IDLE_TIMEOUT, ITEMS_MAX, ITEMS_MAX_MAX, MAX_ATTEMPTS, MAX_ATTEMPTS_MAX,
    PARALLEL_MAX, RUN_STEPS_MAX, STEP_TIMEOUT, WAIT_TIMEOUT,
};
use capx_core::domain::playbook::rubric::{CRITERIA_MAX, RETRIES, RETRIES_MAX};
use capx_core::domain::playbook::{INPUTS_MAX, STEPS_MAX, YAML_BYTES_MAX, YAML_DEPTH_MAX};
use capx_core::domain::retention::Kept;
use capx_core::domain::schedule::{CATCH_UP_MAX, JITTER_MAX};
use capx_core::domain::storable::OUTPUT_BYTES_MAX;
use capx_core::domain::{backoff, delivery, flow, playbook::expr, secret};
use capx_core::engine::slots::QUEUED_MAX;
use capx_core::engine::start::PARAMS_BYTES_MAX;
use capx_core::store::webhooks::WEBHOOKS_MAX;
use capx_workers::WorkerConfig;
use capx_workers::adapters::ANSWER_BYTES_MAX;
use capx_workers::tools::workspace::FILE_BYTES_MAX;
use clap::Args;
use serde_json::json;

use crate::api::BODY_BYTES_MAX;
use crate::cli::show;

/// What the doctor is asked.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Every limit with its name and default.
    #[arg(long, required = true)]
    defaults: bool,
    /// A JSON list.
    #[arg(long)]
    json: bool,
}

/// A limit: its name, what it is, and who may set it where.
type Limit = (&'static str, String, &'static str);

/// Prints the table.
pub fn run(args: &DoctorArgs) {
    let limits = limits();
    if args.json {
        let told = limits.iter().map(|(name, value, set)| json!({"name": name, "default": value, "set_by": set}));
        return show::json(&told.collect());
    }
    let rows = limits.into_iter().map(|(name, value, set)| [name.to_owned(), value, set.to_owned()]);
    show::table(["LIMIT", "DEFAULT", "SET BY"], rows.collect(), "");
}

fn limits() -> Vec<Limit> {
    let worker = WorkerConfig::default();
    let time = duration::written;
    let kept = backoff::Backoff::default();
    vec![
        ("playbook, bytes of YAML", bytes(YAML_BYTES_MAX), ""),
        ("playbook, depth of nesting", YAML_DEPTH_MAX.to_string(), ""),
        ("playbook, steps", STEPS_MAX.to_string(), ""),
        ("playbook, inputs", INPUTS_MAX.to_string(), ""),
        ("expression, parts", expr::NODES_MAX.to_string(), ""),
        ("expression, what it makes", bytes(expr::RESULT_BYTES_MAX), ""),
        ("run, steps taken, loops included", RUN_STEPS_MAX.to_string(), ""),
        ("run, outputs kept inline together", bytes(RUN_BYTES_MAX as usize), ""),
        ("run, depth of calls", DEPTH_MAX.to_string(), ""),
        ("run, parameters", bytes(PARAMS_BYTES_MAX), ""),
        ("run, idempotency key", format!("{KEY_CHARS_MAX} characters"), ""),
        ("step, tries for transient, rate_limited, timeout", MAX_ATTEMPTS.to_string(), "retry.max_attempts, to 100"),
        ("step, tries for invalid, governance", "1".into(), "retry.on"),
        ("step, tries at most", MAX_ATTEMPTS_MAX.to_string(), ""),
        ("step, first pause between tries", time(kept.initial), "retry.initial"),
        ("step, longest pause between tries", time(kept.max), "retry.max"),
        ("step, longest Retry-After", time(backoff::RETRY_AFTER_MAX), ""),
        ("step, deaths of workers before quarantine", CRASHES_MAX.to_string(), ""),
        ("step, time of an attempt", time(STEP_TIMEOUT), "timeout, timeout.hard"),
        ("step, time without progress", time(IDLE_TIMEOUT), "timeout.idle"),
        ("step, output kept inline", bytes(OUTPUT_BYTES_MAX), ""),
        ("artifact", bytes(ARTIFACT_BYTES_MAX), ""),
        ("run, artifacts together", bytes(RUN_ARTIFACTS_BYTES_MAX as usize), ""),
        ("step, message of an error", format!("{MESSAGE_CHARS_MAX} characters"), ""),
        ("step, criteria of a rubric", CRITERIA_MAX.to_string(), ""),
        ("step, drafts more for a rubric", RETRIES.to_string(), "rubric.max_retries, to 20"),
        ("step, drafts more at most", RETRIES_MAX.to_string(), ""),
        ("list, items", ITEMS_MAX.to_string(), "max_items, to 10000"),
        ("list, items at most", ITEMS_MAX_MAX.to_string(), ""),
        ("list, items at once", "1".into(), "max_parallel, to 1000"),
        ("list, items at once at most", PARALLEL_MAX.to_string(), ""),
        ("wait for an event", time(WAIT_TIMEOUT), "wait_for.timeout"),
        ("approval, then it is rejected", time(APPROVAL_TIMEOUT), "approval.timeout, on_timeout"),
        ("concurrency, runs at once at most", CONCURRENCY_MAX.to_string(), "concurrency.limit"),
        ("concurrency, runs that wait", QUEUED_MAX.to_string(), ""),
        ("secret, bytes", bytes(secret::VALUE_BYTES_MAX), ""),
        ("secrets of a company", secret::SECRETS_MAX.to_string(), ""),
        ("secrets of a playbook", secret::NAMED_MAX.to_string(), ""),
        ("schedule, missed fires made up for", "the latest".into(), "trigger.catch_up"),
        ("schedule, missed fires at most", CATCH_UP_MAX.to_string(), ""),
        ("schedule, jitter at most", time(JITTER_MAX), ""),
        ("file.write, file.read, a file", bytes(FILE_BYTES_MAX), ""),
        ("http.request, an answer", bytes(ARTIFACT_BYTES_MAX), ""),
        ("agent, an answer", bytes(ANSWER_BYTES_MAX), ""),
        ("API, a request", bytes(BODY_BYTES_MAX), ""),
        ("webhooks of an account", WEBHOOKS_MAX.to_string(), ""),
        ("webhook, time for an answer", time(delivery::TIMEOUT), ""),
        ("webhook, tries", (delivery::SCHEDULE.len() + 1).to_string(), ""),
        ("webhook, bytes kept of an answer", bytes(delivery::ANSWER_BYTES_MAX), ""),
        ("webhook, time without any success until it is disabled", time(delivery::FAILING_MAX), ""),
        ("webhook, sent at once", flow::BEARS_MAX.to_string(), "max_concurrency"),
        ("retention of runs", days(Kept::Runs), "PATCH /v1/retention"),
        ("retention of failed runs", days(Kept::FailedRuns), "PATCH /v1/retention"),
        ("retention of events without a run", days(Kept::Activity), "PATCH /v1/retention"),
        ("retention of deliveries", days(Kept::Deliveries), "PATCH /v1/retention"),
        ("retention of failed deliveries", days(Kept::FailedDeliveries), "PATCH /v1/retention"),
        ("worker, lease", time(worker.lease), "--lease, CAPX_LEASE"),
        ("worker, attempts at once", worker.slots.to_string(), "--concurrency"),
        ("worker, looks at an idle queue every", time(worker.poll), ""),
        ("worker, drain", time(worker.drain), ""),
    ]
}

fn days(kept: Kept) -> String {
    format!("{}d", kept.default_days())
}

fn bytes(bytes: usize) -> String {
    const KIB: usize = 1024;
    match bytes {
        many if many % (KIB * KIB) == 0 => format!("{} MiB", many / KIB / KIB),
        many if many % KIB == 0 => format!("{} KiB", many / KIB),
        few => format!("{few} bytes"),
    }
}

#[cfg(test)]
mod tests {
    /// The guide has the same table.
    #[test]
    fn the_guide_tells_the_same() {
        let rows = super::limits().into_iter().map(|(name, value, set)| {
            let set = if set.is_empty() { String::new() } else { format!("`{}`", set.replace(", ", "`, `")) };
            format!("| {name} | {value} | {set} |\n")
        });
        let table: String = rows.collect();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide/limits.md");
        let page = std::fs::read_to_string(path).expect("the page");
        let head = page.split_inclusive("|---|---|---|\n").next().unwrap_or_default();
        if std::env::var_os("CAPX_WRITE_GOLDEN").is_some() {
            std::fs::write(path, format!("{head}{table}")).expect("written");
            return;
        }
        assert_eq!(page, format!("{head}{table}"), "write it anew with CAPX_WRITE_GOLDEN=1");
    }
}
