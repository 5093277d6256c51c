//! Requests read strictly: a wrong type says which field, an unknown field
//! what was probably meant, and nothing half-read reaches a handler.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use capx_core::domain::address::Rules;
use capx_core::domain::playbook::problem::did_you_mean;
use capx_core::domain::storable;
use capx_core::engine::FieldProblem;
use http_body_util::LengthLimitError;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use utoipa::ToSchema;

use super::command::request_digest;
use super::{ApiError, ApiState, BODY_BYTES_MAX};

/// A JSON body. An empty one counts as `{}`, for actions that need none.
#[derive(Debug)]
pub struct Body<T> {
    /// As it was read.
    pub body: T,
    /// What tells this request apart from another with the same key.
    pub digest: [u8; 32],
}

/// The body of an action that takes nothing.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// What a body must hold besides its types.
pub trait Check {
    /// Everything that is wrong with its values; `rules` are those for addresses.
    fn problems(&self, rules: &Rules) -> Vec<FieldProblem> {
        let _ = rules;
        Vec::new()
    }
}

impl Check for Nothing {}

/// How deep JSON may be nested.
const DEPTH_MAX: usize = 64;
/// How many values a body may hold, keys of objects included.
const VALUES_MAX: usize = 50_000;

impl<T: DeserializeOwned + Check> FromRequest<Arc<ApiState>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<ApiState>) -> Result<Self, ApiError> {
        let method = request.method().clone();
        let is_json = request.headers().get(CONTENT_TYPE).map(|value| {
            value.to_str().is_ok_and(|text| {
                let kind = text.split(';').next().unwrap_or_default().trim();
                kind.eq_ignore_ascii_case("application/json") || kind.to_ascii_lowercase().ends_with("+json")
            })
        });
        let bytes = bytes(request, state).await?;
        let digest = request_digest(&method, &bytes);
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self { body: read(Value::Object(serde_json::Map::new()), &state.rules)?, digest });
        }
        if is_json != Some(true) {
            return Err(ApiError::UnsupportedMediaType);
        }
        if let Some(message) = too_complex(&bytes) {
            return Err(ApiError::Invalid { message, fields: Vec::new() });
        }
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| ApiError::Invalid {
            message: format!("the body is not valid JSON: {error}"),
            fields: Vec::new(),
        })?;
        storable::to_json(&value, usize::MAX)
            .map_err(|error| ApiError::Invalid { message: format!("the body {error}"), fields: Vec::new() })?;
        Ok(Self { body: read(value, &state.rules)?, digest })
    }
}

/// The bytes of a body, as many as a body may have, and in its time.
///
/// # Errors
/// What is wrong with it.
pub async fn bytes(request: Request, state: &ApiState) -> Result<Bytes, ApiError> {
    let declared =
        request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<usize>().ok());
    if declared.is_some_and(|length| length > BODY_BYTES_MAX) {
        return Err(ApiError::TooLarge);
    }
    let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX);
    tokio::time::timeout(state.limits.body, bytes).await.map_err(|_| ApiError::TooSlow(state.limits.body))?.map_err(
        |error| match std::error::Error::source(&error) {
            Some(source) if source.is::<LengthLimitError>() => ApiError::TooLarge,
            _ => ApiError::Invalid { message: "the body is cut off, or framed wrongly".into(), fields: Vec::new() },
        },
    )
}

/// What is wrong with a body before it is read: reading it would cost many
/// times its size.
fn too_complex(bytes: &[u8]) -> Option<String> {
    let (mut depth, mut values) = (0_usize, 1_usize);
    let (mut in_text, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Some(format!("the body is nested deeper than {DEPTH_MAX} levels"));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' | b':' => values += 1,
            _ => {}
        }
    }
    (values > VALUES_MAX).then(|| format!("the body holds more than {VALUES_MAX} keys and values"))
}

/// How many wrong fields of a body are told at once.
const PROBLEMS_MAX: usize = 20;

/// Reads a body, or says all that is wrong with its fields: what is wrong is
/// put right in a copy, until serde comes to the end, and the values of that are
/// looked at too.
fn read<T: DeserializeOwned + Check>(value: Value, rules: &Rules) -> Result<T, ApiError> {
    if !value.is_object() {
        return Err(ApiError::Invalid { message: "the body must be a JSON object".into(), fields: Vec::new() });
    }
    let mut mended = value;
    let mut problems: Vec<FieldProblem> = Vec::new();
    // A missing field is put right in two goes: null tells its type.
    for _ in 0..2 * PROBLEMS_MAX {
        match serde_path_to_error::deserialize::<_, T>(&mended) {
            Ok(read) => {
                let values = read.problems(rules);
                if problems.is_empty() && values.is_empty() {
                    return Ok(read);
                }
                let structural = std::mem::take(&mut problems);
                problems.extend(values.into_iter().filter(|value| !within(&structural, &value.field)));
                problems.splice(0..0, structural);
                break;
            }
            Err(error) => {
                let wrong = Wrong::of(error.path(), &error.inner().to_string());
                let placeholder = wrong.placeholder;
                if !within(&problems, &wrong.field) {
                    problems.push(FieldProblem::new(wrong.field, wrong.message));
                }
                if problems.len() == PROBLEMS_MAX || !mend(&mut mended, &wrong.at, placeholder) {
                    break;
                }
            }
        }
    }
    Err(ApiError::fields(problems))
}

/// Whether a field lies within one that is told already: what follows from a
/// problem is none.
fn within(known: &[FieldProblem], field: &str) -> bool {
    let holds = |known: &FieldProblem| {
        field.strip_prefix(&known.field).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    known.iter().any(holds)
}

/// Puts a value at a place, or takes away what is there; false where there is
/// no such place.
fn mend(body: &mut Value, at: &[String], value: Option<Value>) -> bool {
    let Some((last, within)) = at.split_last() else { return false };
    let mut holder = body;
    for name in within {
        let inner = match holder {
            Value::Object(map) => map.get_mut(name),
            Value::Array(list) => name.parse().ok().and_then(|at: usize| list.get_mut(at)),
            _ => None,
        };
        let Some(inner) = inner else { return false };
        holder = inner;
    }
    match (holder, value) {
        (Value::Object(map), Some(value)) => map.insert(last.clone(), value).is_none_or(|before| before != map[last]),
        (Value::Object(map), None) => map.remove(last).is_some(),
        (Value::Array(list), Some(value)) => match last.parse().ok().and_then(|at: usize| list.get_mut(at)) {
            Some(item) => std::mem::replace(item, value.clone()) != value,
            None => false,
        },
        _ => false,
    }
}

/// serde's words, turned into a field, a sentence for the caller, and what
/// would do in its place.
struct Wrong {
    field: String,
    message: String,
    at: Vec<String>,
    placeholder: Option<Value>,
}

impl Wrong {
    fn of(path: &serde_path_to_error::Path, said: &str) -> Self {
        use serde_path_to_error::Segment;
        let mut at: Vec<String> = Vec::new();
        for segment in path {
            match segment {
                Segment::Seq { index } => at.push(index.to_string()),
                Segment::Map { key } => at.push(key.clone()),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        let quoted = said.split('`').nth(1).unwrap_or_default();
        let unknown = said.starts_with("unknown field");
        if (unknown || said.starts_with("missing field")) && at.last().is_none_or(|last| last != quoted) {
            at.push(quoted.to_owned());
        }
        let (message, placeholder) = if unknown {
            let known: Vec<&str> =
                said.split("expected").nth(1).unwrap_or_default().split('`').skip(1).step_by(2).collect();
            let hint = did_you_mean(quoted, known.iter().copied()).unwrap_or_else(|| match known.as_slice() {
                [] => "it takes none".into(),
                known => format!("it takes {}", known.join(", ")),
            });
            (format!("unknown field; {hint}"), None)
        } else if said.starts_with("missing field") {
            ("is required".to_owned(), Some(Value::Null))
        } else {
            let expected = said.rsplit("expected ").next().unwrap_or_default();
            let fitting = match expected {
                _ if expected.contains("string") => Value::from(""),
                _ if expected.contains("sequence") => Value::Array(Vec::new()),
                _ if expected.contains("map") || expected.contains("struct") => Value::Object(serde_json::Map::new()),
                _ if expected.contains("boolean") => Value::Bool(false),
                _ => Value::from(0),
            };
            // `invalid type: integer `7`, expected a string`
            let found = said.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "));
            let message = match found {
                Some((found, expected)) => format!("must be {expected}, not {found}"),
                None => said.to_owned(),
            };
            (message, Some(fitting))
        };
        let field = if at.is_empty() { "body".to_owned() } else { at.join(".") };
        Self { field, message, at, placeholder }
    }
}

/// The parts of a path.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let read = axum::extract::Path::from_request_parts(parts, state).await;
        read.map(|axum::extract::Path(parts)| Self(parts)).map_err(|error| ApiError::field("path", error.body_text()))
    }
}

/// Query parameters. A name that stands twice is an error, but for those that
/// are lists.
#[derive(Debug)]
pub struct Query<T>(pub T);

/// The parameters that may stand several times, read as [`Several`].
const REPEATABLE: &[&str] = &["tag"];
/// Between the values of such a one: no text of a query may hold it.
const SEPARATOR: char = '\u{1f}';

/// The values of a parameter that may stand several times.
#[derive(Debug, Clone, Default, PartialEq, Eq, ToSchema)]
#[schema(value_type = Vec<String>)]
pub struct Several(pub Vec<String>);

impl<'de> Deserialize<'de> for Several {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let joined = String::deserialize(deserializer)?;
        Ok(Self(joined.split(SEPARATOR).map(str::to_owned).collect()))
    }
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let mut given: Vec<(String, String)> = Vec::new();
        for (name, value) in form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()) {
            if value.contains(SEPARATOR) || value.contains('\u{fffd}') {
                return Err(ApiError::field(name, "must be text in UTF-8, without U+001F and U+FFFD"));
            }
            match given.iter_mut().find(|(known, _)| *known == name) {
                None => given.push((name.into_owned(), value.into_owned())),
                Some((known, values)) if REPEATABLE.contains(&known.as_str()) => {
                    values.push(SEPARATOR);
                    values.push_str(&value);
                }
                Some((known, _)) => return Err(ApiError::field(known.clone(), "stands more than once")),
            }
        }
        let pairs = given.into_iter().map(|(name, value)| (name, Parameter(value)));
        let fields = serde::de::value::MapDeserializer::<_, serde::de::value::Error>::new(pairs);
        serde_path_to_error::deserialize(fields).map(Self).map_err(|error| {
            let wrong = Wrong::of(error.path(), &error.inner().to_string());
            ApiError::field(wrong.field, wrong.message)
        })
    }
}

/// One value of a query: text, read as what is wanted.
struct Parameter(String);

impl<'de> serde::de::IntoDeserializer<'de, serde::de::value::Error> for Parameter {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! parsed {
    ($($method:ident $visit:ident $what:literal,)+) => {
        $(fn $method<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            let value = self.0.parse().map_err(|_| serde::de::Error::custom(concat!("must be ", $what)))?;
            visitor.$visit(value)
        })+
    };
}

impl<'de> serde::Deserializer<'de> for Parameter {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_string(self.0)
    }

    fn deserialize_option<V: serde::de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: serde::de::Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_enum(serde::de::value::StringDeserializer::new(self.0))
    }

    parsed! {
        deserialize_i64 visit_i64 "a whole number",
        deserialize_u64 visit_u64 "a whole number, 0 or more",
        deserialize_bool visit_bool "true or false",
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 u8 u16 u32 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// A filter that names one of a few, checked.
pub fn one_of<'a>(field: &str, given: Option<&'a str>, known: &[&str]) -> Result<Option<&'a str>, ApiError> {
    match given {
        Some(name) if !known.contains(&name) => {
            Err(ApiError::field(field, format!("must be one of {}", known.join(", "))))
        }
        given => Ok(given),
    }
}

/// A page's limit, checked.
pub fn limit(given: Option<i64>, default: i64, max: i64) -> Result<i64, ApiError> {
    match given.unwrap_or(default) {
        limit if (1..=max).contains(&limit) => Ok(limit),
        _ => Err(ApiError::field("limit", format!("must be from 1 to {max}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[expect(dead_code, reason = "only read by serde")]
        role: String,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        name: String,
        #[expect(dead_code, reason = "only read by serde")]
        agents: Vec<Inner>,
    }

    impl Check for Outer {
        fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
            if self.name.len() > 3 { vec![FieldProblem::new("name", "is too long")] } else { Vec::new() }
        }
    }

    fn wrong(value: Value) -> Vec<(String, String)> {
        match read::<Outer>(value, &Rules::default()).expect_err("is refused") {
            ApiError::Invalid { fields, .. } => fields.into_iter().map(|f| (f.field, f.message)).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_wrong_field_is_named_by_its_path() {
        let all = wrong(json!({"name": "x", "agents": [{"role": 3}]}));
        assert_eq!(all[0].0, "agents.0.role");
        assert_eq!(all[0].1, "must be a string, not integer `3`");
        assert_eq!(wrong(json!({"agents": []})), [("name".into(), "is required".into())]);
        let all = wrong(json!({"name": "x", "agents": [{"role": "x", "rol": 1}]}));
        assert_eq!(all, [("agents.0.rol".into(), "unknown field; did you mean `role`?".into())]);
    }

    #[test]
    fn all_wrong_fields_are_told_at_once() {
        let all = wrong(json!({"nam": "x", "agents": [{"role": true}, {"rol": "x"}, 3, "x", {"role": "x"}]}));
        let mut fields: Vec<&str> = all.iter().map(|(field, _)| field.as_str()).collect();
        fields.sort_unstable();
        let wanted = ["agents.0.role", "agents.1.rol", "agents.1.role", "agents.2", "agents.3", "nam", "name"];
        assert_eq!(fields, wanted);
        let all = wrong(json!({"name": {}, "agents": {}}));
        assert_eq!(all.len(), 2, "{all:?}");
    }

    #[test]
    fn wrong_values_are_told_beside_wrong_fields() {
        let all = wrong(json!({"name": "too long", "agents": [{"role": "x", "rol": 1}]}));
        let fields: Vec<&str> = all.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["agents.0.rol", "name"]);
        assert_eq!(wrong(json!({"name": 12_345, "agents": []})).len(), 1, "what follows from one is none");
    }

    #[test]
    fn there_is_an_end_to_what_is_told() {
        let agents: Vec<Value> = (0..1_000).map(|_| json!({"rol": 1})).collect();
        assert_eq!(wrong(json!({"name": "x", "agents": agents})).len(), PROBLEMS_MAX);
    }
}
