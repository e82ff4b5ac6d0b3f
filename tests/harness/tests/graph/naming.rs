//! The names that nodes are shown by, and names in images that are more than file names.

use crate::names::qemu_img;
use crate::rig::{open_root, options, read, run};
use block::ErrorKind;
use block::graph::{Graph, NamePolicy};
use serde_json::{Value, json};
use tempfile::TempDir;

fn graph(policy: NamePolicy) -> Graph {
    Graph::new(
        &[protocols::DRIVERS, formats::DRIVERS, filters::DRIVERS],
        policy,
    )
}

/// What the node of a definition is called, "DIR" standing for the directory.
fn name_of(dir: &TempDir, definition: Value) -> String {
    let directory = dir.path().display().to_string();
    let text = definition.to_string().replace("DIR", &directory);
    let mut definition: Value = serde_json::from_str(&text).unwrap();
    definition["node-name"] = "top".into();
    run(async {
        let graph = graph(NamePolicy::default());
        let node = graph.add(options(definition)).await.unwrap();
        node.filename().replace(&directory, "DIR")
    })
}

fn images() -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("base.raw"), [7; 65536]).unwrap();
    let over = ["-F", "raw", "-b", "base.raw", "top.qcow2"];
    let create = [&["create", "-f", "qcow2"], &over[..]].concat();
    qemu_img(dir.path(), &create);
    dir
}

#[test]
fn a_format_on_a_file_has_the_files_name_unless_options_change_what_is_read() {
    let dir = images();
    let file = json!({"driver": "file", "filename": "DIR/top.qcow2", "locking": "off"});
    assert_eq!(name_of(&dir, file.clone()), "DIR/top.qcow2");
    let qcow2 = json!({"driver": "qcow2", "file": file, "l2-cache-size": 65536});
    assert_eq!(name_of(&dir, qcow2), "DIR/top.qcow2");
    let raw = json!({"driver": "raw", "file": file});
    assert_eq!(name_of(&dir, raw.clone()), "DIR/top.qcow2");
    let window = json!({"driver": "raw", "size": 65536, "file": file});
    assert_eq!(
        name_of(&dir, window),
        "json:{\"driver\": \"raw\", \"size\": 65536, \"file\": {\"driver\": \"file\", \
         \"filename\": \"DIR/top.qcow2\"}}"
    );
    // A format that is not looked for on top of another format is not found by the name either.
    let nested = json!({"driver": "qcow2", "file": raw});
    assert!(name_of(&dir, nested).starts_with("json:{\"driver\": \"qcow2\", \"file\": {"));
}

#[test]
fn another_backing_than_the_image_names_is_part_of_the_name() {
    let dir = images();
    let file = json!({"driver": "file", "filename": "DIR/top.qcow2"});
    let without = json!({"driver": "qcow2", "file": file, "backing": null});
    assert_eq!(
        name_of(&dir, without),
        "json:{\"backing\": null, \"driver\": \"qcow2\", \"file\": {\"driver\": \"file\", \
         \"filename\": \"DIR/top.qcow2\"}}"
    );
    let null = json!({"driver": "qcow2", "file": file, "backing": {"driver": "null-co"}});
    assert_eq!(
        name_of(&dir, null),
        "json:{\"backing\": {\"driver\": \"null-co\"}, \"driver\": \"qcow2\", \"file\": \
         {\"driver\": \"file\", \"filename\": \"DIR/top.qcow2\"}}"
    );
}

#[test]
fn options_in_an_image_obey_the_policy_for_names() {
    let dir = images();
    let path = dir.path().display().to_string();
    let allowed = || NamePolicy {
        allowed_dirs: vec![dir.path().to_owned()],
        ..NamePolicy::default()
    };
    let open = |name: &str, policy: NamePolicy| {
        let name = name.replace("DIR", &path);
        let rebase = ["rebase", "-u", "-F", "raw", "-b", &name, "top.qcow2"];
        qemu_img(dir.path(), &rebase);
        run(async {
            let graph = graph(policy);
            let file = json!({"driver": "file", "filename": dir.path().join("top.qcow2")});
            let top = json!({"driver": "qcow2", "node-name": "top", "file": file});
            graph
                .add(options(json!({"driver": "null-co", "node-name": "mine"})))
                .await?;
            let node = graph.add(options(top)).await?;
            let root = open_root(&node).attach();
            Ok::<u8, block::Error>(read(&root, 0, 512).await.unwrap()[0])
        })
    };
    let file = "json:{\"file\": {\"driver\": \"file\", \"filename\": \"DIR/base.raw\"}}";
    assert_eq!(open(file, allowed()).unwrap(), 7);
    assert_eq!(open("file:DIR/base.raw", allowed()).unwrap(), 7);
    let names = [
        "json:{\"file\": {\"driver\": \"file\", \"filename\": \"DIR/../x\"}}",
        "json:{\"file\": {\"driver\": \"file\", \"filename\": \"/dev/zero\"}}",
        "json:{\"file\": \"mine\"}",
        "file:/etc/passwd",
    ];
    for name in names {
        let error = open(name, allowed()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
    }
    let error = open("foo:bar", allowed()).unwrap_err();
    assert_eq!(
        error.message,
        "Could not open backing file: Unknown protocol 'foo'"
    );
    assert!(open("json:{\"file\": {\"driver\": \"null-co\"}}", allowed()).is_ok());
}

#[test]
fn filters_have_a_name_only_with_a_syntax_of_their_own() {
    let dir = images();
    let file = json!({"driver": "file", "filename": "DIR/base.raw"});
    let below = "\"file\": {\"driver\": \"file\", \"filename\": \"DIR/base.raw\"}";
    let preallocate = json!({"driver": "preallocate", "file": file});
    assert_eq!(
        name_of(&dir, preallocate),
        format!("json:{{\"driver\": \"preallocate\", {below}}}")
    );
    let zeroes = json!({"driver": "null-co", "size": 65536, "read-zeroes": true});
    let verify = json!({"driver": "blkverify", "raw": file, "test": file});
    assert_eq!(name_of(&dir, verify), "blkverify:DIR/base.raw:DIR/base.raw");
    let nameless = json!({"driver": "blkverify", "raw": zeroes, "test": file});
    assert!(name_of(&dir, nameless).starts_with("json:{\"test\": {"));
    let quorum = json!({"driver": "quorum", "vote-threshold": 1, "children": [file, file]});
    assert!(name_of(&dir, quorum).starts_with("json:{\"children\": [{\"driver\": \"file\""));
    run(async {
        let graph = graph(NamePolicy::default()).with_probing();
        let directory = dir.path().display();
        std::fs::copy(dir.path().join("base.raw"), dir.path().join("copy.raw")).unwrap();
        let name = format!("blkverify:{directory}/base.raw:{directory}/copy.raw");
        let mut definition = graph.definition_of(&name).unwrap();
        definition.insert("driver".into(), "raw".into());
        definition.insert("node-name".into(), "top".into());
        let node = graph.add(definition).await.unwrap();
        let handle = open_root(&node).attach();
        assert_eq!(read(&handle, 512, 512).await.unwrap(), [7; 512]);
        assert_eq!(node.filename(), name);
    });
}

#[test]
fn a_file_name_with_a_colon_is_shown_so_that_it_is_no_protocol() {
    let graph = graph(NamePolicy::default());
    let name = |name: &str| graph.names().options(name).unwrap()["filename"].clone();
    assert_eq!(name("file:image:top"), json!("./image:top"));
    assert_eq!(name("file:dir/image:top"), json!("dir/image:top"));
    assert_eq!(name("./image:top"), json!("./image:top"));
}
