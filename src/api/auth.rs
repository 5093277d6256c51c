//! Who calls, and what they may do. A route is registered together with the
//! scope that it asks for, so none can forget to.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, IF_NONE_MATCH};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use capx_core::domain::ids::{AccountId, CompanyId, KeyId};
use capx_core::domain::key::ApiKey;
use capx_core::store::StoreError;
use capx_core::store::tenancy::{self, Plans, Tenant};
use capx_core::store::tenants::{self, CompanyRow};
use sqlx::{PgConnection, Postgres, Transaction};

use super::admission::meter::{Refused, Standing};
use super::admission::{Barred, Permit};
use super::peer::Peer;
use super::{ApiError, ApiState, Shared};

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)+) => {
        /// What a key may do.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Scope { $($(#[$doc])* $name,)+ }

        impl Scope {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Its name.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

scopes! {
    /// Whatever needs every scope: keys.
    Everything = "*",
    /// List and retrieve companies.
    CompaniesRead = "companies:read",
    /// Create and change companies.
    CompaniesWrite = "companies:write",
    /// List and retrieve agents, their activity and costs.
    AgentsRead = "agents:read",
    /// Add and change agents.
    AgentsWrite = "agents:write",
    /// List and retrieve tasks.
    TasksRead = "tasks:read",
    /// Create and change tasks.
    TasksWrite = "tasks:write",
    /// List and retrieve playbooks and runs.
    PlaybooksRead = "playbooks:read",
    /// Create playbooks, start runs.
    PlaybooksWrite = "playbooks:write",
    /// The activity feed and cost data.
    ActivityRead = "activity:read",
    /// List and retrieve approvals.
    ApprovalsRead = "approvals:read",
    /// Decide approvals.
    ApprovalsWrite = "approvals:write",
    /// List and retrieve webhooks.
    WebhooksRead = "webhooks:read",
    /// Register and change webhooks.
    WebhooksWrite = "webhooks:write",
    /// See workers and dead letters.
    OpsRead = "ops:read",
    /// Retry dead letters.
    OpsWrite = "ops:write",
}

/// What a route asks of whoever calls it.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// The scope that a key needs.
    pub scope: Scope,
    /// What a success costs.
    pub credits: i64,
}

/// An authenticated caller with the scope of its route.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The key.
    pub key: KeyId,
    /// Whose it is.
    pub account: AccountId,
    /// The one company it sees, when it is bound.
    pub company: Option<CompanyId>,
    /// Held as long as the request, or the stream that it became, is open.
    pub permit: Arc<Permit>,
    /// What the request costs when it succeeds.
    pub credits: i64,
    pub(super) path: Arc<str>,
    pub(super) idempotency_key: Option<String>,
    pub(super) if_none_match: Option<HeaderValue>,
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        // There is one behind every route that was registered with a scope.
        parts.extensions.get::<Self>().cloned().ok_or(ApiError::Internal)
    }
}

const NO_KEY: &str = "no API key; send `Authorization: Bearer capx_sk_…`";
const BAD_KEY: &str = "the API key is not valid or was revoked";
const TWO_KEYS: &str = "more than one Authorization header; send one";

/// The longest Idempotency-Key, in characters.
const IDEMPOTENCY_KEY_CHARS_MAX: usize = 255;

/// Reads the key that a request shows.
fn shown_key(headers: &HeaderMap) -> Result<ApiKey, &'static str> {
    let mut given = headers.get_all(AUTHORIZATION).iter();
    let header = given.next().ok_or(NO_KEY)?;
    if given.next().is_some() {
        return Err(TWO_KEYS);
    }
    let text = header.to_str().map_err(|_| BAD_KEY)?;
    let (scheme, token) = text.split_once(' ').ok_or(NO_KEY)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(NO_KEY);
    }
    // A key with a wrong checksum costs no query.
    ApiKey::parse(token.trim()).ok_or(BAD_KEY)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all("idempotency-key").iter();
    let Some(key) = given.next() else { return Ok(None) };
    let wrong = || {
        ApiError::field("Idempotency-Key", format!("must be one header of 1 to {IDEMPOTENCY_KEY_CHARS_MAX} characters"))
    };
    let text = key.to_str().map_err(|_| wrong())?;
    if given.next().is_some() || !(1..=IDEMPOTENCY_KEY_CHARS_MAX).contains(&text.len()) {
        return Err(wrong());
    }
    Ok(Some(text.to_owned()))
}

/// The middleware of every route with a scope: lets the request in, or not.
pub(super) async fn admit(
    State((state, access)): State<(Arc<ApiState>, Access)>,
    request: Request,
    next: Next,
) -> Response {
    let (mut parts, body) = request.into_parts();
    let caller = match caller(&state, access, &parts).await {
        Ok(caller) => caller,
        Err((error, standing)) => {
            let mut response = error.into_response();
            tell(response.headers_mut(), standing);
            return response;
        }
    };
    let permit = Arc::clone(&caller.permit);
    parts.extensions.insert(caller);
    let mut response = next.run(Request::from_parts(parts, body)).await;
    tell(response.headers_mut(), permit.standing());
    response
}

async fn caller(state: &ApiState, access: Access, request: &Parts) -> Result<Caller, (ApiError, Standing)> {
    let from = client(state, &request.headers, &request.extensions);
    let admission = &state.admission;
    let stranger = |error| (error, admission.stranger_standing(from));
    let key = shown_key(&request.headers).map_err(|why| {
        if let Some(wait) = admission.stranger(from) {
            return stranger(too_many_failures(wait));
        }
        admission.failed(from);
        stranger(ApiError::Unauthorized(why))
    })?;
    let permit = admission.enter(&key, from).await.map_err(|barred| match barred {
        Barred::Key => stranger(ApiError::Unauthorized(BAD_KEY)),
        Barred::Stranger(wait) => stranger(too_many_failures(wait)),
        Barred::Store(error) => stranger(error.into()),
        Barred::Limit(refusal, standing) => {
            let message = match refusal.what {
                Refused::Minute(rate) => format!("you have exceeded {rate} requests per minute"),
                Refused::Second => "you have exceeded your tier's requests per second".into(),
                Refused::Concurrent(most) => format!("more than {most} requests of your account are open at once"),
            };
            (ApiError::RateLimited { message, retry_after: refusal.retry_after }, standing)
        }
    })?;
    let row = Arc::clone(&permit.key);
    let standing = permit.standing();
    if !row.scopes.iter().any(|scope| scope == "*" || scope == access.scope.as_str()) {
        return Err((ApiError::Forbidden(access.scope.as_str()), standing));
    }
    Ok(Caller {
        key: row.key,
        account: row.account,
        company: row.company,
        permit: Arc::new(permit),
        credits: access.credits,
        path: request.uri.path().into(),
        idempotency_key: idempotency_key(&request.headers).map_err(|error| (error, standing))?,
        if_none_match: request.headers.get(IF_NONE_MATCH).cloned(),
    })
}

fn too_many_failures(wait: Duration) -> ApiError {
    let message = "too many requests without a valid API key from your address".into();
    ApiError::RateLimited { message, retry_after: wait }
}

fn client(state: &ApiState, headers: &HeaderMap, extensions: &Extensions) -> IpAddr {
    let peer = extensions.get::<Peer>().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0);
    state.proxies.client(peer, headers)
}

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

fn tell(headers: &mut HeaderMap, standing: Standing) {
    headers.insert(LIMIT, standing.limit.into());
    headers.insert(REMAINING, standing.remaining.into());
    headers.insert(RESET, standing.reset.into());
}

/// The headers of an answer to whoever was not even asked for a key.
pub(super) async fn tell_strangers(State(state): Shared, request: Request, next: Next) -> Response {
    let from = client(&state, request.headers(), request.extensions());
    let mut response = next.run(request).await;
    if !response.headers().contains_key(LIMIT) {
        tell(response.headers_mut(), state.admission.stranger_standing(from));
    }
    response
}

impl Caller {
    /// Whom its transactions serve.
    pub fn tenant(&self) -> Tenant {
        Tenant { account: self.account, company: self.company }
    }

    /// A transaction that sees what this caller may see, for lists.
    pub async fn read(&self, state: &ApiState) -> Result<Transaction<'static, Postgres>, StoreError> {
        tenancy::begin(&state.tenants, self.tenant(), Plans::Anew).await
    }

    /// The same, for rows that are named.
    pub async fn look_up(&self, state: &ApiState) -> Result<Transaction<'static, Postgres>, StoreError> {
        tenancy::begin(&state.tenants, self.tenant(), Plans::Kept).await
    }

    /// A company by the id in the path: 404 for what is not this caller's,
    /// with the same answer as for what does not exist.
    pub async fn company_row(&self, tx: &mut PgConnection, id: &str) -> Result<CompanyRow, ApiError> {
        let company: CompanyId = id.parse().map_err(|_| ApiError::NotFound("company"))?;
        tenants::company(tx, self.account, self.company, company).await?.ok_or(ApiError::NotFound("company"))
    }

    /// The same, where its id is all that is needed.
    pub async fn company_id(&self, tx: &mut PgConnection, id: &str) -> Result<CompanyId, ApiError> {
        let company: CompanyId = id.parse().map_err(|_| ApiError::NotFound("company"))?;
        let seen = tenants::sees_company(tx, self.account, self.company, company).await?;
        if seen { Ok(company) } else { Err(ApiError::NotFound("company")) }
    }
}
