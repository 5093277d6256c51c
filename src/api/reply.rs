//! Successes as the API tells them: data, and the meta that goes with it.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, ETAG};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use capx_core::domain::digest;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;

use super::ApiError;
use super::auth::Caller;
use super::request::current_id;

/// What goes with every answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Meta {
    /// Credits that this request cost; 0 for test keys.
    #[schema(minimum = 0)]
    credits_used: i64,
    /// Credits that the account has left.
    credits_remaining: i64,
    /// The `X-Request-Id` of the answer.
    request_id: String,
}

/// What goes with a page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct PageMeta {
    /// Where the next page begins; null on the last.
    #[schema(required)]
    cursor: Option<String>,
    /// Whether there are more.
    has_more: bool,
    #[serde(flatten)]
    meta: Meta,
}

/// An answer about one thing.
#[derive(Debug, Serialize, ToSchema)]
pub struct One<T> {
    /// Always true.
    success: bool,
    data: T,
    meta: Meta,
}

/// An answer to whoever needs no key.
#[derive(Debug, Serialize, ToSchema)]
pub struct Open<T> {
    /// Always true.
    success: bool,
    data: T,
    meta: OpenMeta,
}

/// What goes with that.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenMeta {
    /// The `X-Request-Id` of the answer.
    request_id: String,
}

/// Such an answer.
pub fn open(status: StatusCode, data: impl Serialize) -> Result<Response, ApiError> {
    let meta = OpenMeta { request_id: current_id() };
    Ok(json(status, text(&Open { success: true, data, meta })?))
}

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Many<T> {
    /// Always true.
    success: bool,
    data: Vec<T>,
    meta: PageMeta,
}

/// A whole list, without pages.
#[derive(Debug, Serialize, ToSchema)]
pub struct All<T> {
    /// Always true.
    success: bool,
    data: Vec<T>,
    meta: Meta,
}

/// A time as answers show it: whole seconds, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ToSchema)]
#[schema(value_type = String, format = DateTime, example = "2026-05-25T10:00:00Z")]
pub struct Time(pub DateTime<Utc>);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_rfc3339_opts(SecondsFormat::Secs, true))
    }
}

/// One page of a list.
#[derive(Debug)]
pub struct Page<T> {
    /// The items.
    pub data: Vec<T>,
    /// Where the next page begins; `None` on the last.
    pub cursor: Option<String>,
}

/// Cuts the one item too many that a list asks for, and makes the cursor from
/// the last one shown.
pub fn page<R, T>(mut rows: Vec<R>, limit: i64, cursor: impl Fn(&R) -> String, show: impl Fn(R) -> T) -> Page<T> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    let cursor = rows.last().filter(|_| more).map(cursor);
    Page { data: rows.into_iter().map(show).collect(), cursor }
}

/// The cursor of a list that goes by id.
pub fn id_cursor(id: Uuid) -> String {
    id.simple().to_string()
}

/// Reads it back.
pub fn cursor(given: Option<&str>) -> Result<Option<Uuid>, ApiError> {
    // As it was made, and not in another of the forms that an id may have.
    let read = |text: &str| Uuid::try_parse(text).ok().filter(|id| id_cursor(*id) == text);
    given.map(|text| read(text).ok_or_else(wrong_cursor)).transpose()
}

/// What is said of a cursor that is none.
pub fn wrong_cursor() -> ApiError {
    ApiError::field("cursor", "is not a cursor of this list; pass `meta.cursor` of the page before as it was")
}

impl Caller {
    fn meta(&self) -> Meta {
        let credits_used = if self.permit.key.live { self.credits } else { 0 };
        Meta { credits_used, credits_remaining: self.permit.charge(self.credits), request_id: current_id() }
    }

    /// The body of an answer about one thing, charged.
    pub(super) fn body(&self, data: impl Serialize) -> Result<String, ApiError> {
        text(&One { success: true, data, meta: self.meta() })
    }

    /// The same of a request that is charged already.
    pub(super) fn body_again(&self, data: impl Serialize) -> Result<String, ApiError> {
        let credits_used = if self.permit.key.live { self.credits } else { 0 };
        let meta = Meta { credits_used, credits_remaining: self.permit.charge(0), request_id: current_id() };
        text(&One { success: true, data, meta })
    }

    /// An answer about one thing that is read, with its ETag.
    pub fn one(&self, data: &impl Serialize) -> Result<Response, ApiError> {
        let tag = digest::hex(&digest::sha256(text(data)?)[..12]);
        let tag = HeaderValue::try_from(format!("W/\"{tag}\"")).map_err(|_| ApiError::Internal)?;
        if let Some(unchanged) = self.unchanged(&tag) {
            return Ok(unchanged);
        }
        let mut response = json(StatusCode::OK, self.body(data)?);
        response.headers_mut().insert(ETAG, tag);
        Ok(response)
    }

    /// The answer to a caller that has what the tag stands for.
    pub fn unchanged(&self, tag: &HeaderValue) -> Option<Response> {
        self.if_none_match.as_ref().filter(|given| names(given, tag))?;
        let _ = self.permit.charge(self.credits);
        Some((StatusCode::NOT_MODIFIED, [(ETAG, tag.clone())]).into_response())
    }

    /// An answer that is read and has no tag: a figure of the moment.
    pub fn figures(&self, data: impl Serialize) -> Result<Response, ApiError> {
        Ok(json(StatusCode::OK, self.body(data)?))
    }

    /// An answer about what was made outside of a [`super::command::Command`].
    pub fn created(&self, data: impl Serialize) -> Result<Response, ApiError> {
        Ok(json(StatusCode::CREATED, self.body(data)?))
    }

    /// More about what a [`super::command::Command`] has committed and charged.
    pub fn again(&self, status: StatusCode, data: impl Serialize) -> Result<Response, ApiError> {
        Ok(json(status, self.body_again(data)?))
    }

    /// A whole list.
    pub fn all<T: Serialize>(&self, data: Vec<T>) -> Result<Response, ApiError> {
        Ok(json(StatusCode::OK, text(&All { success: true, data, meta: self.meta() })?))
    }

    /// A page of a list.
    pub fn list<T: Serialize>(&self, page: Page<T>) -> Result<Response, ApiError> {
        let meta = PageMeta { has_more: page.cursor.is_some(), cursor: page.cursor, meta: self.meta() };
        Ok(json(StatusCode::OK, text(&Many { success: true, data: page.data, meta })?))
    }
}

/// Whether `If-None-Match` names a tag: weakly, as lists and `*` go.
fn names(given: &HeaderValue, tag: &HeaderValue) -> bool {
    let opaque = |text: &str| text.trim().trim_start_matches("W/").to_owned();
    match (given.to_str(), tag.to_str()) {
        (Ok(given), Ok(tag)) => given.trim() == "*" || given.split(',').any(|one| opaque(one) == opaque(tag)),
        _ => false,
    }
}

fn text(value: &impl Serialize) -> Result<String, ApiError> {
    serde_json::to_string(value).map_err(|error| {
        tracing::error!(%error, "an answer could not be written");
        ApiError::Internal
    })
}

/// A JSON answer.
pub(super) fn json(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_known_again_alone_in_a_list_and_by_a_star() {
        let tag = HeaderValue::from_static("W/\"abc\"");
        for given in ["W/\"abc\"", "\"abc\"", "\"x\", W/\"abc\"", "*"] {
            assert!(names(&HeaderValue::from_static(given), &tag), "{given}");
        }
        for given in ["abc", "W/\"ab\"", ""] {
            assert!(!names(&HeaderValue::from_static(given), &tag), "{given}");
        }
    }

    #[test]
    fn a_cursor_is_read_as_it_was_made_and_no_other_way() {
        let id = Uuid::now_v7();
        assert_eq!(cursor(Some(&id_cursor(id))).expect("a cursor"), Some(id));
        for forged in [id.to_string(), id_cursor(id).to_uppercase(), String::new(), "1".into(), "\u{0}".into()] {
            assert!(cursor(Some(&forged)).is_err(), "{forged}");
        }
    }
}
