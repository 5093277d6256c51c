//! The second wall between tenants: a transaction that says whom it serves.
//!
//! Every query names its tenant; that is the first wall. Behind it the
//! database's row-level security shows a transaction only what belongs to the
//! account that it names, so that a query which forgets finds nothing.

use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Transaction};

use super::{SYSTEM_ROLE, StoreError};
use crate::domain::ids::{AccountId, CompanyId};

/// Whom a request serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenant {
    /// The account.
    pub account: AccountId,
    /// Its one company that the caller's key is bound to, if it is.
    pub company: Option<CompanyId>,
}

/// How the statements of a transaction are planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plans {
    /// Once a connection, by index: for rows that are named.
    Kept,
    /// Each time: for lists, whose filters decide which index serves.
    Anew,
}

/// What lists have otherwise than the pool.
const ANEW: &str = ", set_config('plan_cache_mode', 'force_custom_plan', true), \
    set_config('enable_seqscan', 'on', true), set_config('enable_bitmapscan', 'on', true), \
    set_config('enable_mergejoin', 'on', true)";

/// Begins a transaction of a tenant over a pool of [`super::PoolKind::Tenants`];
/// beginning and naming are one round trip.
pub async fn begin(pool: &PgPool, tenant: Tenant, plans: Plans) -> Result<Transaction<'static, Postgres>, StoreError> {
    let plans = match plans {
        Plans::Kept => "",
        Plans::Anew => ANEW,
    };
    let company = tenant.company.map(|company| company.0.to_string()).unwrap_or_default();
    // Ids of our own making, and text of no other kind.
    let sql = format!(
        "begin; select set_config('capx.account', '{}', true), set_config('capx.company', '{company}', true){plans}",
        tenant.account.0
    );
    pool.begin_with(AssertSqlSafe(sql)).await.map_err(StoreError::from)
}

/// Takes the second wall away for the rest of a transaction: it is about the
/// server itself, and whoever asks has been found to run it.
pub async fn serve_all(tx: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query(AssertSqlSafe(format!("set local role {SYSTEM_ROLE}"))).execute(tx).await?;
    Ok(())
}
