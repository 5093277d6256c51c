//! The document of the API, made from the handlers: what a route adds to it is
//! added where it is registered, so that document and behaviour are one.

use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use capx_core::domain::delivery::TEST;
use capx_core::domain::event::{NAMES, shape};
use capx_core::domain::playbook;
use serde::Serialize;
use serde_json::json;
use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Content, KnownFormat, ObjectBuilder, OpenApi, Ref, RefOr, Required, ResponseBuilder, SchemaFormat, Type,
};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use super::auth::{Access, Scope, admit};
use super::{ApiState, Shared};

const SCHEME: &str = "bearer";
const ERROR: &str = "Error";
const ERROR_SCHEMA: &str = "Failure";

/// Routes of the API, each with the scope that it asks for: without one there
/// is no way to register it.
pub(super) struct Routes {
    router: OpenApiRouter<Arc<ApiState>>,
    state: Arc<ApiState>,
}

impl Routes {
    pub(super) fn new(state: Arc<ApiState>) -> Self {
        Self { router: OpenApiRouter::with_openapi(document()), state }
    }

    /// A route, what it asks for and what it costs.
    pub(super) fn with(mut self, scope: Scope, credits: i64, route: UtoipaMethodRouter<Arc<ApiState>>) -> Self {
        let (schemas, mut paths, methods) = route;
        for item in paths.paths.values_mut() {
            for (operation, changes) in
                [(&mut item.get, false), (&mut item.post, true), (&mut item.patch, true), (&mut item.delete, true)]
            {
                if let Some(operation) = operation {
                    describe(operation, scope, credits, changes);
                }
            }
        }
        let access = (Arc::clone(&self.state), Access { scope, credits });
        let methods = methods.route_layer(axum::middleware::from_fn_with_state(access, admit));
        self.router = self.router.routes((schemas, paths, methods));
        self
    }

    /// A route that needs no key: whoever calls it shows otherwise that they may.
    pub(super) fn open(mut self, route: UtoipaMethodRouter<Arc<ApiState>>) -> Self {
        let (schemas, mut paths, methods) = route;
        for operation in paths.paths.values_mut().filter_map(|item| item.post.as_mut()) {
            operation.security = Some(Vec::new());
            may_fail(operation, &["400", "401", "404", "408", "413", "414", "500", "503"]);
        }
        self.router = self.router.routes((schemas, paths, methods));
        self
    }

    /// The routes under `/v1`, and their document.
    pub(super) fn finish(self) -> (axum::Router<Arc<ApiState>>, OpenApi) {
        OpenApiRouter::new().nest("/v1", self.router).split_for_parts()
    }
}

/// What all operations share.
fn describe(operation: &mut Operation, scope: Scope, credits: i64, changes: bool) {
    operation.security = Some(vec![SecurityRequirement::new(SCHEME, [scope.as_str()])]);
    let facts = ExtensionsBuilder::new().add("x-scope", scope.as_str()).add("x-credits", credits).build();
    operation.extensions.get_or_insert_with(Default::default).merge(facts);
    if changes {
        let description = "Of your choice, unique for each request: the same request with the same key is carried out once, and answered the same for 24 hours.";
        let schema = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(255)).build();
        let header = ParameterBuilder::new()
            .name("Idempotency-Key")
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(description))
            .schema(Some(schema))
            .build();
        operation.parameters.get_or_insert_default().push(RefOr::T(header));
    }
    let mut statuses = vec!["400", "401", "403", "404", "408", "414", "429", "500", "503"];
    if changes {
        statuses.extend(["409", "413", "415", "422"]);
    }
    may_fail(operation, &statuses);
}

fn may_fail(operation: &mut Operation, statuses: &[&str]) {
    for &status in statuses {
        let error = RefOr::Ref(Ref::from_response_name(ERROR));
        operation.responses.responses.entry(status.to_owned()).or_insert(error);
    }
}

/// Why a request failed.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Failure)]
pub struct Failure {
    /// Always false.
    success: bool,
    error: Fault,
    meta: FailureMeta,
}

/// What was wrong.
#[derive(Debug, Serialize, ToSchema)]
struct Fault {
    /// For machines, e.g. `invalid_request`.
    code: String,
    /// For people: what is wrong, and what to do.
    message: String,
    /// Where to read more.
    docs: String,
    /// Each wrong field, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    fields: Option<Vec<FieldFault>>,
}

/// A wrong field.
#[derive(Debug, Serialize, ToSchema)]
struct FieldFault {
    /// Dotted path, e.g. `agents.0.role`.
    field: String,
    /// What is wrong with it, and what to write instead.
    message: String,
}

/// What goes with a failure.
#[derive(Debug, Serialize, ToSchema)]
struct FailureMeta {
    /// The `X-Request-Id` of the answer.
    request_id: String,
}

/// What every operation's document rests on.
fn document() -> OpenApi {
    let mut document = utoipa::openapi::OpenApiBuilder::new()
        .info(
            utoipa::openapi::InfoBuilder::new()
                .title("capx")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(include_str!("openapi.md")))
                .license(Some(
                    utoipa::openapi::LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build(),
                )),
        )
        .build();
    let components = document.components.get_or_insert_default();
    let http =
        HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("capx_sk_live_… or capx_sk_test_…").build();
    components.security_schemes.insert(SCHEME.into(), RefOr::T(SecurityScheme::Http(http)));
    let mut schemas = vec![(ERROR_SCHEMA.to_owned(), Failure::schema())];
    Failure::schemas(&mut schemas);
    components.schemas.extend(schemas);
    let number = || {
        ObjectBuilder::new()
            .schema_type(Type::Integer)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int64)))
            .build()
    };
    let error = ResponseBuilder::new()
        .description("What was wrong. 429 and 503 say in `Retry-After` when to try again.")
        .content("application/json", Content::new(Some(Ref::from_schema_name(ERROR_SCHEMA))))
        .header("Retry-After", HeaderBuilder::new().schema(Some(number())).description(Some("Seconds.")).build())
        .build();
    components.responses.insert(ERROR.into(), RefOr::T(error));
    document
}

/// The document, as it is served.
pub(super) async fn serve(State(state): Shared) -> Response {
    ([(CONTENT_TYPE, "application/json")], Arc::clone(&state.document).to_string()).into_response()
}

/// The schema of playbooks for editors, which have no key.
pub(super) async fn serve_schema() -> Response {
    static SCHEMA: LazyLock<String> = LazyLock::new(|| playbook::schema::schema().to_string());
    ([(CONTENT_TYPE, "application/schema+json")], SCHEMA.as_str()).into_response()
}

const CURSOR: &str = "`meta.cursor` of the page before.";

/// The schema of a filter that names one of a few.
pub(super) fn names(known: &[&str]) -> utoipa::openapi::schema::Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(known.iter().copied())).build()
}

/// A body of which nothing is required may be left out.
pub(super) fn optional_bodies(document: &mut serde_json::Value) {
    let schemas = document["components"]["schemas"].clone();
    let paths = document["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    for operation in paths.filter_map(serde_json::Value::as_object_mut).flat_map(|path| path.values_mut()) {
        let Some(body) = operation.get_mut("requestBody") else { continue };
        let named = body["content"]["application/json"]["schema"]["$ref"].as_str().and_then(|r| r.rsplit('/').next());
        let needs = |name| schemas[name]["required"].as_array().is_some_and(|required| !required.is_empty());
        if named.is_some_and(|name| !needs(name)) {
            body["required"] = false.into();
        }
    }
}

/// What webhooks are sent, a schema for each type of event.
pub(super) fn webhooks(document: &mut serde_json::Value) {
    let header = |name: &str, description: &str| json!({"name": name, "in": "header", "required": true, "description": description, "schema": {"type": "string"}});
    let headers = json!([
        header("webhook-id", "The event's id: the same on every try, and for every webhook."),
        header("webhook-timestamp", "When this try was made, in seconds since 1970."),
        header(
            "webhook-signature",
            "`v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`; several, parted by spaces, while secrets rotate."
        ),
    ]);
    let names = NAMES.iter().copied().chain([TEST]);
    let told = names.filter_map(|name| {
        let body = shape::body(name)?;
        let operation = json!({
            "operationId": format!("on_{}", name.replace('.', "_")),
            "tags": ["Webhooks"],
            "summary": shape::meaning(name),
            "x-event-version": shape::VERSION,
            "parameters": headers,
            "requestBody": {"required": true, "content": {"application/json": {"schema": body}}},
            "responses": {
                "2XX": {"description": "Taken: anything within 15 seconds."},
                "410": {"description": "The webhook wants no more, and is disabled."},
                "default": {"description": "Not taken: it is sent again after 5 s, 5 min, 30 min, 2 h, 5 h, 10 h and 10 h, or after `Retry-After`."},
            },
        });
        Some((name.to_owned(), json!({"post": operation})))
    });
    document["webhooks"] = serde_json::Value::Object(told.collect());
}

/// What every query is asked is said of each filter that is any text at all: no NUL, no
/// separator of our own, and UTF-8.
pub(super) fn plain_texts(document: &mut serde_json::Value) {
    let paths = document["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    let operations = paths.filter_map(serde_json::Value::as_object_mut).flat_map(|path| path.values_mut());
    let parameters = operations.filter_map(|operation| operation.get_mut("parameters")?.as_array_mut()).flatten();
    for parameter in parameters.filter(|parameter| parameter["in"] == "query") {
        let Some(schema) = parameter["schema"].as_object_mut() else { continue };
        let is_text = schema.get("type").is_some_and(|of| of == "string");
        if is_text && !schema.contains_key("enum") && !schema.contains_key("pattern") {
            schema.insert("pattern".into(), r"^[^\u0000\u001f\ufffd]*$".into());
        }
    }
}

/// The schema of a field that names one of a few, or nothing.
pub(super) fn names_or_null(known: &[&str], description: &str) -> utoipa::openapi::schema::Object {
    let values = known.iter().map(|name| serde_json::Value::from(*name)).chain([serde_json::Value::Null]);
    ObjectBuilder::new()
        .schema_type(utoipa::openapi::schema::SchemaType::from_iter([Type::String, Type::Null]))
        .enum_values(Some(values))
        .description(Some(description))
        .build()
}

/// The schema of a cursor of a list that goes by id.
pub(super) fn id_cursor() -> utoipa::openapi::schema::Object {
    ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[0-9a-f]{32}$")).description(Some(CURSOR)).build()
}

/// The schema of a cursor of a list that goes by places.
pub(super) fn number_cursor() -> utoipa::openapi::schema::Object {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^(0|[1-9][0-9]{0,8})$"))
        .description(Some(CURSOR))
        .build()
}

/// The schema of a cursor of a feed.
pub(super) fn place_cursor() -> utoipa::openapi::schema::Object {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^[1-9a-f][0-9a-f]{0,14}-[0-9a-f]{32}$"))
        .description(Some(CURSOR))
        .build()
}
