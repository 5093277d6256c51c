//! Companies are paused, go on, are stopped and deleted.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::PgConnection;

use super::EngineError;
pub use crate::domain::company::Change;
use crate::domain::company::{Verdict, may_be_deleted};
use crate::domain::event::{COMPANY_STATUS_CHANGED, Event};
use crate::domain::ids::CompanyId;
use crate::store::jobs::{NewJob, kind, queue};
use crate::store::{events, jobs, tenants};

/// Changes a company's status; says since when it has it. The same again
/// changes nothing.
pub async fn change(tx: &mut PgConnection, company: CompanyId, change: Change) -> Result<DateTime<Utc>, EngineError> {
    let (status, since) = tenants::lock_company(tx, company).await?.ok_or(EngineError::NotFound("company"))?;
    // Calls that are under way end, too.
    let kills = matches!(change, Change::Kill | Change::Stop);
    let next = match change.decide(&status) {
        Verdict::Stays if change == Change::Kill => {
            return Ok(tenants::set_company_status(tx, company, &status, true).await?);
        }
        Verdict::Stays => return Ok(since),
        Verdict::Refused(why) => return Err(EngineError::Conflict(format!("the company {why}"))),
        Verdict::Becomes(next) => next,
    };
    let at = tenants::set_company_status(tx, company, next, kills).await?;
    let happened = Event::new(
        COMPANY_STATUS_CHANGED,
        json!({"company_id": company, "from": status, "to": next, "killed": change == Change::Kill}),
    );
    events::append(&mut *tx, company, &[happened]).await?;
    if next != "paused" {
        // What waited goes on, or is found by workers that end it.
        jobs::unpark(tx, company).await?;
    }
    Ok(at)
}

/// What was decided before a company was deleted may be written after it was
/// purged; it is purged once more after this time.
const PURGED_AGAIN: Duration = Duration::from_secs(600);

/// Deletes a company that is paused or stopped. What it holds is out of sight
/// at once; a job takes it away.
pub async fn delete(tx: &mut PgConnection, company: CompanyId) -> Result<(), EngineError> {
    let (status, _) = tenants::lock_company(tx, company).await?.ok_or(EngineError::NotFound("company"))?;
    if !may_be_deleted(&status) {
        return Err(EngineError::Conflict(format!("the company is {status}; pause or stop it first")));
    }
    // Before the company goes, and with it the right to write what is its.
    for delay in [Duration::ZERO, PURGED_AGAIN] {
        let purge = NewJob { ref_id: Some(company.0), delay, ..NewJob::new(queue::SYSTEM, kind::PURGE, company) };
        jobs::enqueue(&mut *tx, &purge).await?;
    }
    tenants::delete_company(tx, company).await?;
    Ok(())
}
