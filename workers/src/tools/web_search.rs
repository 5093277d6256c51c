//! `web_search {query, count?}` -> `{results: [{title, url, text}]}`, by the search endpoint that
//! the operator has named: any that answers `GET ?q=…&format=json` with `results`, as SearXNG
//! does, or with `web.results`, as Brave's does.

use capx_core::domain::outcome::Failure;
use reqwest::{Method, Url};
use serde_json::{Value, json};

use super::{ToolCall, only, text};
use crate::egress::Call;
use crate::handlers::Hands;

/// The endpoint for searches of the web.
#[derive(Clone)]
pub struct Search {
    /// Where it is; the query is added to it.
    pub url: Url,
    /// What it is called with, where it needs a key: the header's name and value.
    pub key: Option<(String, String)>,
}

impl std::fmt::Debug for Search {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Search({})", self.url)
    }
}

/// The longest query, in characters.
const QUERY_CHARS_MAX: usize = 1_000;
/// Results that are given at most, and without a word.
const COUNT_MAX: u64 = 20;
const COUNT: u64 = 8;
/// The largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 2 * 1024 * 1024;
/// So much of a result's text, in characters.
const TEXT_CHARS_MAX: usize = 1_000;

pub(super) async fn run(hands: &Hands, call: ToolCall<'_>) -> Result<Value, Failure> {
    only(&call.params, &["query", "count"])?;
    let query = text(&call.params, "query")?;
    if query.chars().count() > QUERY_CHARS_MAX {
        return Err(Failure::invalid(format!("params.query has at most {QUERY_CHARS_MAX} characters")));
    }
    let count = call.params.get("count").and_then(Value::as_u64).unwrap_or(COUNT).clamp(1, COUNT_MAX);
    let Some(search) = &hands.search else {
        return Err(Failure::invalid(
            "there is no search: the operator names one by CAPX_SEARCH_URL on the workers, such as a SearXNG's /search",
        ));
    };
    let mut url = search.url.clone();
    url.query_pairs_mut()
        .append_pair("q", query)
        .append_pair("format", "json")
        .append_pair("count", &count.to_string());
    let answer = hands
        .egress
        .call(Call {
            method: Method::GET,
            url: url.into(),
            headers: search.key.clone().into_iter().chain([("accept".into(), "application/json".into())]).collect(),
            body: None,
            idempotency_key: call.idempotency_key.clone(),
            timeout: call.timeout,
            idle: call.idle,
            limit: ANSWER_BYTES_MAX,
            large: None,
            trusted: true,
        })
        .await?;
    if let Some(failure) = answer.failure() {
        return Err(Failure { message: format!("the search: {}", failure.message), ..failure });
    }
    let body: Value = serde_json::from_slice(&answer.body)
        .map_err(|error| Failure::transient(format!("the search has answered no JSON: {error}")))?;
    let found = body.get("results").or_else(|| body.pointer("/web/results")).and_then(Value::as_array);
    let Some(found) = found else {
        return Err(Failure::invalid("the search has answered no list of `results`"));
    };
    let limit = usize::try_from(count).unwrap_or(usize::MAX);
    let results: Vec<Value> = found.iter().take(limit).map(result).collect();
    Ok(json!({"query": query, "results": results}))
}

fn result(found: &Value) -> Value {
    let of = |names: &[&str]| names.iter().find_map(|name| found.get(*name)?.as_str()).unwrap_or_default();
    let words: String = of(&["content", "description", "snippet", "text"]).chars().take(TEXT_CHARS_MAX).collect();
    json!({"title": of(&["title"]), "url": of(&["url", "link"]), "text": words})
}
