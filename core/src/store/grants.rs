//! What API processes take from the limits of accounts, and what a presented
//! key stands for: one statement for both.

use std::time::Duration;

use sqlx::PgPool;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, CompanyId, KeyId};

/// How long a process holds slots without asking again: after its death they
/// are others'.
pub const SLOTS_HELD: Duration = Duration::from_secs(5);

/// What a process wants of an account's limits.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// Whose limits, where that is known.
    pub account: Option<AccountId>,
    /// SHA-256 of a presented key, to be looked up; its account wins.
    pub hash: Option<[u8; 32]>,
    /// Requests that it would hand out.
    pub want: u32,
    /// Requests that it had and did not use.
    pub back: u32,
    /// Concurrent requests that are under way.
    pub held: u32,
    /// Concurrent requests that it would have in all.
    pub slots: u32,
    /// Credits that were used.
    pub spent: i64,
}

/// What a presented key stands for.
#[derive(Debug, Clone)]
pub struct KeyRow {
    /// The key.
    pub key: KeyId,
    /// Whose it is.
    pub account: AccountId,
    /// The one company it sees, when it is bound.
    pub company: Option<CompanyId>,
    /// Spends credits and has effects.
    pub live: bool,
    /// What it may do.
    pub scopes: Vec<String>,
}

/// What it got.
#[derive(Debug, Clone)]
pub struct Given {
    /// The key, when one was asked for and is good.
    pub key: Option<KeyRow>,
    /// Whose limits these are.
    pub account: AccountId,
    /// Requests that it may hand out.
    pub granted: u32,
    /// Concurrent requests that it may have in all.
    pub slots: u32,
    /// Requests a minute.
    pub rate: u32,
    /// Concurrent requests over all processes.
    pub most: u32,
    /// Requests of this minute that nobody has taken.
    pub minute: f64,
    /// Credits that are left.
    pub credits: i64,
}

/// Takes and gives back, in the order asked; `None` for a key that is not good.
pub async fn take(pool: &PgPool, process: Uuid, asks: &[Ask]) -> Result<Vec<Option<Given>>, StoreError> {
    let number = |f: fn(&Ask) -> u32| asks.iter().map(|a| i32::try_from(f(a)).unwrap_or(i32::MAX)).collect::<Vec<_>>();
    let rows = sqlx::query_file!(
        "src/store/sql/take_grants.sql",
        process.to_string(),
        &asks.iter().map(|a| a.account.map(|account| account.0)).collect::<Vec<_>>() as &[Option<Uuid>],
        &asks.iter().map(|a| a.hash.map(Vec::from)).collect::<Vec<_>>() as &[Option<Vec<u8>>],
        &number(|a| a.want),
        &number(|a| a.back),
        &number(|a| a.held),
        &number(|a| a.slots),
        &asks.iter().map(|a| a.spent).collect::<Vec<_>>(),
        SLOTS_HELD.as_secs_f64(),
    )
    .fetch_all(pool)
    .await?;
    let mut given = vec![None; asks.len()];
    for row in rows {
        let place = usize::try_from(row.place - 1).unwrap_or(usize::MAX);
        let (Some(account), Some(slot)) = (row.account_id.map(AccountId), given.get_mut(place)) else { continue };
        let key = row.key_id.map(|key| KeyRow {
            key: KeyId(key),
            account,
            company: row.company_id.map(CompanyId),
            live: row.live.unwrap_or(true),
            scopes: row.scopes.unwrap_or_default(),
        });
        let count = |n: Option<i32>| n.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        *slot = Some(Given {
            key,
            account,
            granted: count(row.granted),
            slots: count(row.slots),
            rate: count(row.rate),
            most: count(row.most),
            minute: row.minute.unwrap_or(0.0),
            credits: row.credits.unwrap_or(0),
        });
    }
    Ok(given)
}
