//! What a deleted company held goes away, a bounded part at a time.

use sqlx::{AssertSqlSafe, PgPool};

use super::StoreError;
use crate::domain::ids::CompanyId;

/// Everything that a company holds, but for the ledger, which is kept for ever.
const TABLES: &[&str] = &[
    "run_steps",
    "runs",
    "events",
    "approvals",
    "dead_letters",
    "task_asks",
    "tasks",
    "playbook_versions",
    "playbooks",
    "agents",
    "cost_deltas",
    "cost_rollups",
    "cost_totals",
    "run_deltas",
    "run_totals",
    "webhooks",
    "flows",
    "pauses",
    "company_secrets",
    "artifacts",
    "run_artifacts",
    "artifact_chunks",
    "waits",
    "signals_taken",
    "signals",
    "triggers",
    "hook_calls",
    "run_fans",
    "run_grades",
    "run_items",
    "run_children",
    "journal",
    "messages",
    "memories",
    "budgets",
    // Last, since no index finds them by their company: work that is still
    // claimed finds no run, and ends.
    "jobs",
];
/// Rows of one statement.
const PURGE_MAX: u64 = 5_000;

/// Deletes a part of what is left, but not the jobs that ask for it; false when
/// nothing is.
pub async fn some(pool: &PgPool, company: CompanyId) -> Result<bool, StoreError> {
    for table in TABLES {
        let but = if *table == "jobs" { "and kind <> 'purge'" } else { "" };
        // A row's place says which row it is within one table, not within the months of events.
        let sql = if *table == "events" {
            format!(
                "delete from events where (company_id, xid, id) in (
                     select company_id, xid, id from events where company_id = $1 limit {PURGE_MAX})"
            )
        } else {
            format!(
                "delete from {table} where ctid = any (array(
                     select ctid from {table} where company_id = $1 {but} limit {PURGE_MAX}))"
            )
        };
        let done = sqlx::query(AssertSqlSafe(sql)).bind(company.0).execute(pool).await?;
        if done.rows_affected() > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
