//! Who calls, and what they may do. The scope is part of a handler's type, so
//! a handler cannot forget to ask for one.

use std::marker::PhantomData;
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use capx_core::domain::ids::{AccountId, CompanyId, KeyId};
use capx_core::domain::key::ApiKey;
use capx_core::store::tenants::{self, CompanyRow};

use super::{ApiError, ApiState};

/// A scope as a type.
pub trait Scope: Send + Sync + 'static {
    /// Its name.
    const NAME: &'static str;
}

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)+) => {
        $($(#[$doc])* #[derive(Debug)] pub struct $name;
          impl Scope for $name { const NAME: &'static str = $text; })+
    };
}

scopes! {
    /// List and retrieve companies.
    CompaniesRead = "companies:read",
    /// Create and change companies.
    CompaniesWrite = "companies:write",
    /// List and retrieve agents.
    AgentsRead = "agents:read",
    /// Add and change agents.
    AgentsWrite = "agents:write",
    /// List and retrieve playbooks and runs.
    PlaybooksRead = "playbooks:read",
    /// Create playbooks, start runs.
    PlaybooksWrite = "playbooks:write",
    /// List and retrieve approvals.
    ApprovalsRead = "approvals:read",
    /// Decide approvals.
    ApprovalsWrite = "approvals:write",
}

/// An authenticated caller with a scope.
#[derive(Debug)]
pub struct Caller<S> {
    /// The key.
    pub key: KeyId,
    /// Whose it is.
    pub account: AccountId,
    /// The one company it sees, when it is bound.
    pub company: Option<CompanyId>,
    /// Spends credits.
    pub live: bool,
    scope: PhantomData<S>,
}

const NO_KEY: &str = "no API key; send `Authorization: Bearer capx_sk_…`";
const BAD_KEY: &str = "the API key is not valid or was revoked";

impl<S: Scope> FromRequestParts<Arc<ApiState>> for Caller<S> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<ApiState>) -> Result<Self, ApiError> {
        let mut given = parts.headers.get_all(AUTHORIZATION).iter();
        let header = given.next().ok_or(ApiError::Unauthorized(NO_KEY))?;
        if given.next().is_some() {
            return Err(ApiError::Unauthorized("more than one Authorization header"));
        }
        let text = header.to_str().map_err(|_| ApiError::Unauthorized(BAD_KEY))?;
        let (scheme, token) = text.split_once(' ').ok_or(ApiError::Unauthorized(NO_KEY))?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(ApiError::Unauthorized(NO_KEY));
        }
        // A key with a wrong checksum costs no query.
        let key = ApiKey::parse(token.trim()).ok_or(ApiError::Unauthorized(BAD_KEY))?;
        // By the hash of 220 random bits: nothing about the key can be learnt
        // from how long the lookup takes.
        let row = tenants::find_key(&state.engine.pool, key.hash()).await?.ok_or(ApiError::Unauthorized(BAD_KEY))?;
        if !row.scopes.iter().any(|scope| scope == "*" || scope == S::NAME) {
            return Err(ApiError::Forbidden(S::NAME));
        }
        Ok(Self { key: row.key, account: row.account, company: row.company, live: row.live, scope: PhantomData })
    }
}

impl<S> Caller<S> {
    /// A company by the id in the path: 404 for what is not this caller's,
    /// with the same answer as for what does not exist.
    pub async fn company(&self, state: &ApiState, id: &str) -> Result<CompanyRow, ApiError> {
        let company: CompanyId = id.parse().map_err(|_| ApiError::NotFound("company"))?;
        tenants::company(&state.engine.pool, self.account, self.company, company)
            .await?
            .ok_or(ApiError::NotFound("company"))
    }
}
