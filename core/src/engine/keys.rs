//! API keys are made.

use sqlx::PgConnection;

use super::EngineError;
use crate::domain::ids::KeyId;
use crate::store::tenants::{self, NewKey};

/// Active keys that are bound to one company, at most.
pub const KEYS_MAX: i64 = 5;

/// Stores a key, unless its company has as many as it may have.
pub async fn create(tx: &mut PgConnection, new: &NewKey<'_>) -> Result<KeyId, EngineError> {
    if let Some(company) = new.company {
        // Under the company's lock, so that two at once do not both fit.
        tenants::lock_company(tx, company).await?.ok_or(EngineError::NotFound("company"))?;
        if tenants::active_keys(tx, company).await? >= KEYS_MAX {
            return Err(EngineError::Conflict(format!(
                "the company has {KEYS_MAX} active keys already; revoke one first"
            )));
        }
    }
    Ok(tenants::insert_key(tx, new).await?)
}
