package containerd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/snapshots"
)

func open(t *testing.T) (context.Context, snapshots.Snapshotter, string) {
	root, err := os.MkdirTemp("", "requests-")
	if err != nil {
		t.Fatal(err)
	}
	ctx := namespaces.WithNamespace(context.Background(), "requests")
	snapshotter, cleanup, err := start(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cleanup(); err != nil {
			t.Error(err)
		}
		// Nothing is left in the store, not even a lock of a container.
		for _, dir := range []string{"layers", "containers", "mnt", "trash"} {
			left, err := os.ReadDir(filepath.Join(root, "store", dir))
			if err != nil || len(left) != 0 {
				t.Errorf("%s: %v %v", dir, left, err)
			}
		}
		os.RemoveAll(root)
	})
	return ctx, snapshotter, root
}

func TestInvalidRequests(t *testing.T) {
	ctx, s, root := open(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	prepare := func(key, parent string, labels ...string) error {
		set := map[string]string{}
		for _, label := range labels {
			set[label] = label
		}
		_, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(set))
		return err
	}
	must(prepare("base-active", ""))
	must(s.Commit(ctx, "base", "base-active"))
	must(prepare("active", "base"))
	_, err := s.View(ctx, "view", "base")
	must(err)

	is := func(name string, matches func(error) bool, err error) {
		t.Helper()
		if err == nil || !matches(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	is("an empty key", errdefs.IsInvalidArgument, prepare("", "base"))
	is("a long key", errdefs.IsInvalidArgument, prepare(strings.Repeat("k", 5000), "base"))
	is("a long label", errdefs.IsInvalidArgument, prepare("x", "base", strings.Repeat("l", 3000)))
	many := []string{}
	for i := 0; i < 100; i++ {
		many = append(many, fmt.Sprintf("%d%s", i, strings.Repeat("l", 1000)))
	}
	is("many labels", errdefs.IsInvalidArgument, prepare("x", "base", many...))
	is("an unknown parent", errdefs.IsNotFound, prepare("x", "unknown"))
	is("an active parent", errdefs.IsInvalidArgument, prepare("x", "active"))
	is("a known key", errdefs.IsAlreadyExists, prepare("active", "base"))
	is("a key as its own parent", errdefs.IsNotFound, prepare("x", "x"))
	is("a commit of a view", errdefs.IsFailedPrecondition, s.Commit(ctx, "x", "view"))
	is("a commit of a committed snapshot", errdefs.IsFailedPrecondition, s.Commit(ctx, "x", "base"))
	is("a commit to a known name", errdefs.IsAlreadyExists, s.Commit(ctx, "base", "active"))
	is("a commit to its own name", errdefs.IsAlreadyExists, s.Commit(ctx, "active", "active"))
	is("a commit to an empty name", errdefs.IsInvalidArgument, s.Commit(ctx, "", "active"))
	is("a commit of an unknown key", errdefs.IsNotFound, s.Commit(ctx, "x", "unknown"))
	is("the removal of a parent", errdefs.IsFailedPrecondition, s.Remove(ctx, "base"))
	is("the removal of an unknown key", errdefs.IsNotFound, s.Remove(ctx, "unknown"))
	_, err = s.Mounts(ctx, "base")
	is("mounts of a committed snapshot", errdefs.IsFailedPrecondition, err)
	_, err = s.Mounts(ctx, "unknown")
	is("mounts of an unknown key", errdefs.IsNotFound, err)
	_, err = s.Usage(ctx, "unknown")
	is("usage of an unknown key", errdefs.IsNotFound, err)
	_, err = s.Stat(ctx, "")
	is("an empty key for stat", errdefs.IsNotFound, err)
	_, err = s.Update(ctx, snapshots.Info{Name: "active"}, "kind")
	is("a fixed field", errdefs.IsInvalidArgument, err)
	_, err = s.Update(ctx, snapshots.Info{Name: "unknown"})
	is("an update of an unknown key", errdefs.IsNotFound, err)
	nothing := func(context.Context, snapshots.Info) error { return nil }
	is("an invalid filter", errdefs.IsInvalidArgument, s.Walk(ctx, nothing, "name=="))

	odd := []string{"../../etc/passwd", "/", "..", "a/b/../c", "a\nb", "\x01\x1b[31m", "ns/1/../../x", "ünïcödé", strings.Repeat("x/", 2000)}
	for _, key := range odd {
		must(prepare(key, "base"))
		info, err := s.Stat(ctx, key)
		must(err)
		if info.Name != key {
			t.Errorf("%q became %q", key, info.Name)
		}
		found := []string{}
		must(s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			found = append(found, info.Name)
			return nil
		}, fmt.Sprintf("name==%s", quote(key))))
		if len(found) != 1 || found[0] != key {
			t.Errorf("%q was listed as %q", key, found)
		}
		must(s.Remove(ctx, key))
	}
	// A snapshot that a command has protected retains its container. Other codes would end containerd's collection.
	cowl := func(args ...string) {
		t.Helper()
		program := filepath.Join(filepath.Dir(os.Getenv("COWL_SNAPSHOTTER_BIN")), "cowl")
		args = append([]string{"--store", filepath.Join(root, "store")}, args...)
		if output, err := exec.Command(program, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, output)
		}
	}
	must(prepare("ns/1/web", "base"))
	cowl("snapshot", "ctr.ns.web", "--name", "kept", "--protect")
	is("the removal of a protected snapshot", errdefs.IsFailedPrecondition, s.Remove(ctx, "ns/1/web"))
	is("a commit of a protected snapshot", errdefs.IsFailedPrecondition, s.Commit(ctx, "x", "ns/1/web"))
	cowl("protect", "ctr.ns.web@kept", "--off")
	must(s.Commit(ctx, "x", "ns/1/web"))
	concurrent(ctx, t, s)
}

// quote quotes a key for a filter.
func quote(key string) string {
	return fmt.Sprintf("%+q", key)
}

// concurrent lets clients compete for the same keys and parents: each request takes effect once or is refused.
func concurrent(ctx context.Context, t *testing.T, s snapshots.Snapshotter) {
	var group sync.WaitGroup
	var mutex sync.Mutex
	created, committed := 0, 0
	for i := 0; i < 8; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			_, err := s.Prepare(ctx, "same", "base")
			mutex.Lock()
			if err == nil {
				created++
			} else if !errdefs.IsAlreadyExists(err) {
				t.Error(err)
			}
			mutex.Unlock()
			err = s.Commit(ctx, "result", "same")
			mutex.Lock()
			if err == nil {
				committed++
			} else if !errdefs.IsNotFound(err) && !errdefs.IsAlreadyExists(err) {
				t.Error(err)
			}
			mutex.Unlock()
		}()
	}
	group.Wait()
	// A repeated commit succeeds as well: its client may not have received the reply.
	if created < 1 || committed < 1 {
		t.Errorf("%d created, %d committed", created, committed)
	}
	for i := 0; i < 20; i++ {
		group.Add(2)
		parent, child := fmt.Sprintf("parent-%d", i), fmt.Sprintf("child-%d", i)
		if _, err := s.Prepare(ctx, parent+"-active", ""); err != nil {
			t.Fatal(err)
		}
		if err := s.Commit(ctx, parent, parent+"-active"); err != nil {
			t.Fatal(err)
		}
		var removed, prepared error
		go func() { removed = s.Remove(ctx, parent); group.Done() }()
		go func() { _, prepared = s.Prepare(ctx, child, parent); group.Done() }()
		group.Wait()
		if (removed == nil) == (prepared == nil) {
			t.Errorf("removal of the parent: %v; its child: %v", removed, prepared)
		}
	}
}
